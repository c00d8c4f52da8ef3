#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

#include "kernels/cuda/cuda_kernels.h"
#include "kernels/cuda/tensors.h"

namespace anabranch {

namespace {

cuda::RouteArguments route_arguments(const torch::Tensor& logits, const RoutingRule& rule) {
  return {cuda::scalar_of(logits), logits.size(0),    logits.size(1), rule.top_k,
          rule.renormalize,        rule.routing_scale};
}

}  // namespace

RouteResult CudaKernels::route(const torch::Tensor& logits, const RoutingRule& rule,
                               const torch::Tensor& expert_bias) const {
  const OnDevice stream(logits);
  const int64_t tokens = logits.size(0);
  const int64_t experts = logits.size(1);
  const auto index = logits.options().dtype(torch::kInt64);
  RouteResult result{at::empty({tokens, rule.top_k}, index),
                     at::empty({tokens, rule.top_k}, logits.options()),
                     at::empty_like(logits),
                     at::empty({tokens}, logits.options()),
                     at::zeros({experts}, index),
                     at::full({}, -1, index)};
  const cuda::RouteResults out{
      result.expert_ids.data_ptr<int64_t>(), result.weights.data_ptr(),
      result.probabilities.data_ptr(),       result.logsumexp.data_ptr(),
      result.counts.data_ptr<int64_t>(),     result.first_nonfinite_token.data_ptr<int64_t>()};
  const auto arguments = route_arguments(logits, rule);
  if (is_plain(rule, expert_bias)) {
    cuda::launch_route(arguments, logits.const_data_ptr(), out, stream);
  } else {
    const cuda::ChoiceArguments choice{
        rule.router_score == RouterScore::kSigmoid,
        expert_bias.defined() ? expert_bias.const_data_ptr() : nullptr, rule.expert_groups,
        rule.top_groups, rule.group_score == GroupScore::kTopTwoSum};
    cuda::launch_route_by_scores(arguments, choice, logits.const_data_ptr(), out, stream);
  }
  return result;
}

RoutingSums CudaKernels::routing_sums(const torch::Tensor& probabilities,
                                      const torch::Tensor& logsumexp) const {
  const OnDevice stream(probabilities);
  const int64_t tokens = probabilities.size(0);
  const int64_t experts = probabilities.size(1);
  const auto options = probabilities.options();
  RoutingSums result{at::empty({experts}, options), at::empty({}, options)};
  const auto scratch = at::empty({cuda::routing_sums_scratch(tokens, experts)}, options);
  const cuda::RoutingSums sums{probabilities.const_data_ptr(), logsumexp.const_data_ptr(),
                               scratch.data_ptr(), result.probabilities.data_ptr(),
                               result.squared_logsumexp.data_ptr()};
  cuda::launch_routing_sums(cuda::scalar_of(probabilities), tokens, experts, sums, stream);
  return result;
}

torch::Tensor CudaKernels::route_backward(const RouteResult& routed, const RoutingRule& rule,
                                          const torch::Tensor& dweights,
                                          const torch::Tensor& dprobability_sum,
                                          const torch::Tensor& dsquared_logsumexp_sum) const {
  const OnDevice stream(routed.probabilities);
  torch::Tensor dlogits = at::empty_like(routed.probabilities);
  const cuda::RouteInputs inputs{routed.expert_ids.const_data_ptr<int64_t>(),
                                 routed.weights.const_data_ptr(),
                                 routed.probabilities.const_data_ptr(),
                                 routed.logsumexp.const_data_ptr(),
                                 dweights.const_data_ptr(),
                                 dprobability_sum.const_data_ptr(),
                                 dsquared_logsumexp_sum.const_data_ptr()};
  const auto launch = rule.router_score == RouterScore::kSigmoid
                          ? cuda::launch_route_backward_of_sigmoids
                          : cuda::launch_route_backward;
  launch(route_arguments(dlogits, rule), inputs, dlogits.data_ptr(), stream);
  return dlogits;
}

const Kernels& cuda_kernels() {
  static const CudaKernels kernels;
  return kernels;
}

}  // namespace anabranch
