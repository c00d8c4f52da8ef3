#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

#include "kernels/cuda/cuda_kernels.h"
#include "kernels/cuda/tensors.h"

namespace anabranch {

RouteResult CudaKernels::route(const torch::Tensor& logits, int64_t top_k, bool renormalize) const {
  const OnDevice stream(logits);
  const int64_t tokens = logits.size(0);
  const int64_t experts = logits.size(1);
  const auto index = logits.options().dtype(torch::kInt64);
  RouteResult result{at::empty({tokens, top_k}, index),
                     at::empty({tokens, top_k}, logits.options()),
                     at::empty_like(logits),
                     at::empty({tokens}, logits.options()),
                     at::zeros({experts}, index),
                     at::full({}, -1, index)};
  cuda::launch_route({cuda::scalar_of(logits), tokens, experts, top_k, renormalize},
                     logits.const_data_ptr(), result.expert_ids.data_ptr<int64_t>(),
                     result.weights.data_ptr(), result.probabilities.data_ptr(),
                     result.logsumexp.data_ptr(), result.counts.data_ptr<int64_t>(),
                     result.first_nonfinite_token.data_ptr<int64_t>(), stream);
  return result;
}

torch::Tensor CudaKernels::route_backward(const RouteResult& routed, bool renormalize,
                                          const torch::Tensor& dweights,
                                          const torch::Tensor& dprobability_sum,
                                          const torch::Tensor& dsquared_logsumexp_sum) const {
  const OnDevice stream(routed.probabilities);
  torch::Tensor dlogits = at::empty_like(routed.probabilities);
  cuda::launch_route_backward(
      {cuda::scalar_of(routed.probabilities), dlogits.size(0), dlogits.size(1),
       routed.expert_ids.size(1), renormalize},
      routed.expert_ids.const_data_ptr<int64_t>(), routed.weights.const_data_ptr(),
      routed.probabilities.const_data_ptr(), routed.logsumexp.const_data_ptr(),
      {dweights.const_data_ptr(), dprobability_sum.const_data_ptr(),
       dsquared_logsumexp_sum.const_data_ptr()},
      dlogits.data_ptr(), stream);
  return dlogits;
}

const Kernels& cuda_kernels() {
  static const CudaKernels kernels;
  return kernels;
}

}  // namespace anabranch
