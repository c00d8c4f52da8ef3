#include "experts/feed_forward.h"

#include "kernels/kernels.h"

namespace anabranch {

torch::Tensor project(const FeedForward& feed_forward, const torch::Tensor& rows,
                      const Projection& projection, const ExpertCounts& counts) {
  auto result = grouped_gemm(*feed_forward.engine, rows, projection.weight, counts);
  if (projection.bias.defined()) {
    kernels_for(result.device()).add_bias(result, projection.bias, counts);
  }
  return result;
}

torch::Tensor activate(const FeedForward& feed_forward, const torch::Tensor& hidden) {
  return kernels_for(hidden.device()).activate(hidden, feed_forward.activation, feed_forward.glu);
}

DownGradient down_backward(const FeedForward& feed_forward, const torch::Tensor& dy,
                           const torch::Tensor& hidden, const torch::Tensor& values,
                           const Projection& down, const ExpertCounts& counts) {
  const Kernels& kernels = kernels_for(dy.device());
  auto [dhidden, weighted, dvalues] =
      kernels.activate_backward(grouped_gemm_dgrad(*feed_forward.engine, dy, down.weight, counts),
                                hidden, values, feed_forward.activation, feed_forward.glu);
  DownGradient gradient;
  gradient.dhidden = dhidden;
  gradient.dvalues = dvalues;
  gradient.parameters.weight = grouped_gemm_wgrad(*feed_forward.engine, dy, weighted, counts);
  if (down.bias.defined()) {
    gradient.parameters.bias = kernels.bias_gradient(dy, values, counts);
    gradient.dvalues.add_(kernels.bias_dot(dy, down.bias, counts));
  }
  return gradient;
}

UpGradient up_backward(const FeedForward& feed_forward, const torch::Tensor& dhidden,
                       const torch::Tensor& x, const Projection& up, const ExpertCounts& counts) {
  UpGradient gradient;
  gradient.parameters.weight = grouped_gemm_wgrad(*feed_forward.engine, dhidden, x, counts);
  if (up.bias.defined()) {
    gradient.parameters.bias = kernels_for(x.device()).bias_gradient(dhidden, {}, counts);
  }
  gradient.dx = grouped_gemm_dgrad(*feed_forward.engine, dhidden, up.weight, counts);
  return gradient;
}

}  // namespace anabranch
