#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

#include "kernels/routing.h"
#include "kernels/cuda/routing.h"
#include "kernels/cuda/tensors.h"

namespace anabranch {

namespace {

cuda::RouteArguments route_arguments(const torch::Tensor& logits, const RoutingRule& rule) {
  return {cuda::scalar_of(logits), logits.size(0),    logits.size(1), rule.top_k,
          rule.renormalize,        rule.routing_scale};
}

class CudaRoutingKernels final : public RoutingKernels {
 public:
  RouteResult route(const torch::Tensor& logits, const RoutingRule& rule,
                    const torch::Tensor& expert_bias) const override {
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

  RoutingSums routing_sums(const torch::Tensor& probabilities,
                           const torch::Tensor& logsumexp) const override {
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

  torch::Tensor batch_sums(const torch::Tensor& counts, int64_t tokens,
                           const RoutingSums& sums) const override {
    const OnDevice stream(counts);
    const int64_t experts = counts.size(0);
    auto out = at::empty({2 * experts + 2}, counts.options().dtype(torch::kFloat64));
    cuda::launch_batch_sums(cuda::scalar_of(sums.probabilities), counts.const_data_ptr<int64_t>(),
                            tokens, experts, sums.probabilities.const_data_ptr(),
                            sums.squared_logsumexp.const_data_ptr(), out.data_ptr<double>(),
                            stream);
    return out;
  }

  BatchLosses batch_losses(const torch::Tensor& sums, const torch::Tensor& chosen, int64_t top_k,
                           torch::Dtype dtype) const override {
    const OnDevice stream(sums);
    const int64_t experts = chosen.size(0);
    const auto of_type = [&](torch::Dtype type) { return sums.options().dtype(type); };
    BatchLosses losses{at::empty({experts}, of_type(torch::kInt64)), at::empty({}, of_type(dtype)),
                       at::empty({}, of_type(dtype)), at::empty({experts}, sums.options()),
                       at::empty({}, sums.options())};
    cuda::launch_batch_losses(
        cuda::scalar_of(losses.balance), sums.const_data_ptr<double>(),
        chosen.const_data_ptr<double>(), experts, top_k,
        {losses.expert_load.data_ptr<int64_t>(), losses.balance.data_ptr(), losses.z.data_ptr(),
         losses.balance_slope.data_ptr<double>(), losses.z_slope.data_ptr<double>()},
        stream);
    return losses;
  }

  torch::Tensor route_backward(const RouteResult& routed, const RoutingRule& rule,
                               const torch::Tensor& dweights, const torch::Tensor& dprobability_sum,
                               const torch::Tensor& dsquared_logsumexp_sum) const override {
    const OnDevice stream(routed.probabilities);
    torch::Tensor dlogits = at::empty_like(routed.probabilities);
    const cuda::RouteInputs inputs{routed.expert_ids.const_data_ptr<int64_t>(),
                                   routed.weights.const_data_ptr(),
                                   routed.probabilities.const_data_ptr(),
                                   routed.logsumexp.const_data_ptr(),
                                   dweights.const_data_ptr(),
                                   cuda::address_or_null(dprobability_sum),
                                   cuda::address_or_null(dsquared_logsumexp_sum)};
    const auto launch = rule.router_score == RouterScore::kSigmoid
                            ? cuda::launch_route_backward_of_sigmoids
                            : cuda::launch_route_backward;
    launch(route_arguments(dlogits, rule), inputs, dlogits.data_ptr(), stream);
    return dlogits;
  }
};

}  // namespace

const RoutingKernels& RoutingKernels::cuda() {
  static const CudaRoutingKernels kernels;
  return kernels;
}

}  // namespace anabranch
