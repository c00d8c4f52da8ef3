#include "experts/feed_forward.h"

#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <numeric>

#include "kernels/kernels.h"

namespace anabranch {
namespace {

/// Neighbouring experts and their rows.
struct Part {
  int64_t first_expert;
  int64_t first_row;
  int64_t rows;
  ExpertCounts counts;
};

/// Whole experts in parts of about equal rows, at most `parts` of them (an expert is never cut).
std::vector<Part> cut(const ExpertCounts& counts, int64_t parts) {
  const int64_t total = std::accumulate(counts.begin(), counts.end(), int64_t{0});
  std::vector<Part> result;
  int64_t row = 0;
  for (size_t e = 0; e < counts.size(); ++e) {
    const auto wanted = static_cast<int64_t>(result.size());
    // A new part begins where the ones before it have had their share.
    if (result.empty() || (row > 0 && row * parts >= total * wanted)) {
      result.push_back({static_cast<int64_t>(e), row, 0, {}});
    }
    result.back().counts.push_back(counts[e]);
    result.back().rows += counts[e];
    row += counts[e];
  }
  return result;
}

/// A part's intermediate values are alive at a time. On a GPU every launch counts, and an engine
/// balances itself over all experts: one part.
int64_t parts_on(torch::Device device) { return device.is_cpu() ? 4 : 1; }

}  // namespace

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
  DownGradient gradient;
  gradient.parameters.weight = at::empty_like(down.weight);
  gradient.dhidden = at::empty_like(hidden);
  gradient.dvalues =
      at::empty({dy.size(0)}, hidden.options().dtype(at::toOpMathType(hidden.scalar_type())));
  for (const Part& part : cut(counts, parts_on(dy.device()))) {
    const auto rows_of = [&part](const torch::Tensor& tensor) {
      return tensor.defined() ? tensor.narrow(0, part.first_row, part.rows) : tensor;
    };
    const auto experts = static_cast<int64_t>(part.counts.size());
    const auto dy_part = rows_of(dy);
    // The gradient at the activation, then the weighted activation.
    auto activated =
        grouped_gemm_dgrad(*feed_forward.engine, dy_part,
                           down.weight.narrow(0, part.first_expert, experts), part.counts);
    kernels.activate_backward(activated, rows_of(hidden), rows_of(values), feed_forward.activation,
                              feed_forward.glu,
                              {rows_of(gradient.dhidden), rows_of(gradient.dvalues)});
    auto dweight = gradient.parameters.weight.narrow(0, part.first_expert, experts);
    grouped_gemm_wgrad_out(*feed_forward.engine, dy_part, activated, part.counts, dweight);
  }
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
