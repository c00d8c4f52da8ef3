#include <ATen/ops/aminmax.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "kernels/gate.h"
#include "kernels/routing.h"
#include "kernels/sinkhorn.h"
#include "kernels/cuda/routing/routing.h"
#include "kernels/cuda/tensors.h"
#include "support/block.h"
#include "support/cuda/check.h"

namespace anabranch {

namespace {

cuda::RouteArguments route_arguments(const torch::Tensor& probabilities, const RoutingRule& rule) {
  return {cuda::scalar_of(probabilities),
          probabilities.size(0),
          probabilities.size(1),
          rule.top_k,
          rule.renormalize,
          rule.routing_scale};
}

cuda::Losses addresses_of(const BatchLosses& losses) {
  return {losses.expert_load.data_ptr<int64_t>(), losses.balance.data_ptr(), losses.z.data_ptr(),
          losses.balance_slope.data_ptr<double>(), losses.z_slope.data_ptr<double>()};
}

BatchLosses empty_losses(int64_t experts, const torch::TensorOptions& options, torch::Dtype dtype) {
  Block slopes;
  slopes.room(experts, torch::kFloat64).room(1, torch::kFloat64);
  slopes.allocate(options.device());
  // What an operator returns has memory of its own.
  return {at::empty({experts}, options.dtype(torch::kInt64)), at::empty({}, options.dtype(dtype)),
          at::empty({}, options.dtype(dtype)), slopes.take({experts}, torch::kFloat64),
          slopes.take({}, torch::kFloat64)};
}

cuda::ScoreKind score_kind(RouterScore score) {
  switch (score) {
    case RouterScore::kSoftmax:
      return cuda::ScoreKind::kSoftmax;
    case RouterScore::kSigmoid:
      return cuda::ScoreKind::kSigmoid;
    case RouterScore::kSqrtSoftplus:
      break;
  }
  return cuda::ScoreKind::kSqrtSoftplus;
}

template <typename T>
const T* of_type_or_null(const torch::Tensor& tensor) {
  return static_cast<const T*>(cuda::address_or_null(tensor));
}

class CudaRoutingKernels final : public RoutingKernels {
 public:
  RouteResult route(const torch::Tensor& logits, const RoutingRule& rule,
                    const RoutingConditions& conditions, Choice choice) const override {
    const OnDevice stream(logits);
    const int64_t tokens = logits.size(0);
    const int64_t experts = logits.size(-1);
    const auto dtype = logits.scalar_type();
    const int64_t chosen = tokens * rule.top_k;
    // Sigmoids' backward reads the logits: their probabilities are not kept as long as the rest.
    const bool kept = rule.router_score == RouterScore::kSoftmax;
    const bool made = choice == Choice::kMade;
    Block block;
    block.room(experts + 1, torch::kInt64).room(made ? 0 : chosen, torch::kInt64);
    block.room(chosen, dtype).room(kept ? tokens * experts : 0, dtype).room(tokens, dtype);
    block.allocate(logits.device());
    // Counts, and behind them the token that has none.
    const auto found = block.take({experts + 1}, torch::kInt64);
    RouteResult result{
        made ? conditions.expert_ids : block.take({tokens, rule.top_k}, torch::kInt64),
        block.take({tokens, rule.top_k}, dtype),
        kept ? block.take({tokens, experts}, dtype)
             : at::empty({tokens, experts}, logits.options()),
        block.take({tokens}, dtype),
        part_of(found, 0, torch::kInt64, {experts}, {1}),
        part_of(found, 8 * experts, torch::kInt64, {}, {}),
        conditions.padding_mask};
    check_cuda(cudaMemsetAsync(found.data_ptr(), 0xFF, found.nbytes(), stream), "cudaMemsetAsync");
    if (tokens == 0) {
      result.counts.zero_();
    }
    const cuda::RouteResults out{
        result.expert_ids.data_ptr<int64_t>(), result.weights.data_ptr(),
        result.probabilities.data_ptr(),       result.logsumexp.data_ptr(),
        result.counts.data_ptr<int64_t>(),     result.first_nonfinite_token.data_ptr<int64_t>()};
    auto arguments = route_arguments(result.probabilities, rule);
    if (logits.dim() == 3) {
      arguments.logit_parts = logits.size(1);
    }
    if (is_plain(rule, conditions)) {
      cuda::launch_route(arguments, logits.const_data_ptr(), out, stream);
    } else {
      const cuda::ChoiceArguments chosen_by{
          score_kind(rule.router_score),
          cuda::address_or_null(conditions.expert_bias),
          of_type_or_null<int64_t>(conditions.expert_ids),
          kOwnChoice,
          of_type_or_null<bool>(conditions.padding_mask),
          rule.expert_groups,
          rule.top_groups,
          summed_of_group(rule),
          choice == Choice::kByBiasedLogits || chooses_by_logits(rule, conditions.expert_bias)};
      cuda::launch_route_by_scores(arguments, chosen_by, logits.const_data_ptr(), out, stream);
    }
    return result;
  }

  RoutingSums routing_sums(const torch::Tensor& probabilities, const torch::Tensor& logsumexp,
                           int64_t sequences) const override {
    const OnDevice stream(probabilities);
    const int64_t tokens = probabilities.size(0);
    const int64_t experts = probabilities.size(1);
    const auto dtype = probabilities.scalar_type();
    const int64_t for_parts = cuda::routing_sums_scratch(tokens, experts, sequences);
    Block block;
    block.room(experts, dtype).room(1, dtype).room(for_parts, dtype);
    block.allocate(probabilities.device());
    RoutingSums result{block.take({experts}, dtype), block.take({}, dtype),
                       at::empty({sequences, experts}, probabilities.options())};
    const auto scratch = block.take({for_parts}, dtype);
    const cuda::RoutingSums sums{
        probabilities.const_data_ptr(),  logsumexp.const_data_ptr(),          scratch.data_ptr(),
        result.probabilities.data_ptr(), result.squared_logsumexp.data_ptr(), sequences,
        result.of_sequences.data_ptr()};
    cuda::launch_routing_sums(cuda::scalar_of(probabilities), tokens, experts, sums, stream);
    return result;
  }

  torch::Tensor sequence_counts(const torch::Tensor& expert_ids, int64_t sequences, int64_t experts,
                                torch::Dtype dtype) const override {
    const OnDevice stream(expert_ids);
    auto counts = at::zeros({sequences, experts}, expert_ids.options().dtype(dtype));
    cuda::launch_sequence_counts(cuda::scalar_of(counts), expert_ids.const_data_ptr<int64_t>(),
                                 sequences, expert_ids.numel() / sequences, experts,
                                 counts.data_ptr(), stream);
    return counts;
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
    const auto losses = empty_losses(experts, sums.options(), dtype);
    cuda::launch_batch_losses(cuda::scalar_of(losses.balance), sums.const_data_ptr<double>(),
                              chosen.const_data_ptr<double>(), experts, top_k, addresses_of(losses),
                              stream);
    return losses;
  }

  BatchLosses losses_of_one(const torch::Tensor& counts, int64_t tokens, const RoutingSums& sums,
                            int64_t top_k) const override {
    const OnDevice stream(counts);
    const int64_t experts = counts.size(0);
    const auto losses = empty_losses(experts, counts.options(), sums.probabilities.scalar_type());
    cuda::launch_losses_of_one(cuda::scalar_of(losses.balance), counts.const_data_ptr<int64_t>(),
                               tokens, experts, sums.probabilities.const_data_ptr(),
                               sums.squared_logsumexp.const_data_ptr(), top_k, addresses_of(losses),
                               stream);
    return losses;
  }

  torch::Tensor bias_histogram(const torch::Tensor& scores, const RoutingRule& rule,
                               const RoutingConditions& conditions) const override {
    const OnDevice stream(scores);
    const int64_t experts = scores.size(1);
    auto histogram = at::zeros({experts, kBiasBins}, scores.options().dtype(torch::kInt64));
    if (rule.top_k == experts) {  // whatever the biases, all have the same
      return histogram;
    }
    const auto [least, largest] = at::aminmax(conditions.expert_bias);
    const auto cutoffs = at::empty({scores.size(0)}, scores.options());
    const cuda::BiasScores given{scores.const_data_ptr(),
                                 of_type_or_null<bool>(conditions.padding_mask),
                                 conditions.expert_bias.const_data_ptr(),
                                 least.const_data_ptr(),
                                 largest.const_data_ptr(),
                                 cutoffs.data_ptr()};
    cuda::launch_bias_histogram(cuda::scalar_of(scores), scores.size(0), experts, rule.top_k, given,
                                kBiasBins, histogram.data_ptr<int64_t>(), stream);
    return histogram;
  }

  torch::Tensor sinkhorn_bias(const torch::Tensor& logits,
                              const torch::Tensor& left_out) const override {
    const OnDevice stream(logits);
    const int64_t tokens = logits.size(0);
    const int64_t experts = logits.size(1);
    if (tokens == 0) {
      return at::zeros({experts}, logits.options());
    }
    auto bias = at::empty({experts}, logits.options());
    const auto biases = at::empty({2, experts}, logits.options());
    const auto sums = at::zeros({kSinkhornRounds, experts}, logits.options().dtype(torch::kInt64));
    cuda::launch_sinkhorn_bias(
        cuda::scalar_of(logits),
        {tokens, experts, logits.const_data_ptr(), of_type_or_null<bool>(left_out),
         sums.data_ptr<int64_t>(), biases.data_ptr(), bias.data_ptr()},
        stream);
    return bias;
  }

  torch::Tensor choose_tokens(const torch::Tensor& logits, const RoutingRule& rule,
                              const torch::Tensor& padding_mask, int64_t sequences) const override {
    const OnDevice stream(logits);
    const int64_t tokens = logits.size(0);
    const int64_t experts = logits.size(1);
    auto ids = at::empty(logits.sizes(), logits.options().dtype(torch::kInt64));
    if (tokens == 0) {
      return ids;
    }
    const auto columns = at::empty({experts, tokens}, logits.options());
    const auto thresholds =
        at::empty({sequences * experts, static_cast<int64_t>(sizeof(cuda::TokenThreshold))},
                  logits.options().dtype(torch::kByte));
    cuda::launch_choose_tokens(
        cuda::scalar_of(logits),
        {tokens, experts, rule.top_k, tokens / sequences,
         rule.router_score == RouterScore::kSoftmax, logits.const_data_ptr(),
         of_type_or_null<bool>(padding_mask), columns.data_ptr(),
         static_cast<cuda::TokenThreshold*>(thresholds.data_ptr()), ids.data_ptr<int64_t>()},
        stream);
    return ids;
  }

  torch::Tensor route_backward(const RouteResult& routed, const RoutingRule& rule,
                               const torch::Tensor& dweights, const torch::Tensor& dprobability_sum,
                               const torch::Tensor& dsquared_logsumexp_sum,
                               bool split) const override {
    const OnDevice stream(routed.probabilities);
    const auto& probabilities = routed.probabilities;
    const auto options = probabilities.options();
    const int64_t tokens = probabilities.size(0);
    const int64_t sequences =
        dprobability_sum.defined() && dprobability_sum.dim() == 2 ? dprobability_sum.size(0) : 1;
    torch::Tensor dlogits =
        split ? at::empty({tokens, 4, probabilities.size(1)}, options.dtype(torch::kBFloat16))
              : at::empty(probabilities.sizes(), options);
    const auto& places = kSplitGradient;
    const cuda::LogitGradient gradient{split ? nullptr : dlogits.data_ptr(),
                                       split ? dlogits.data_ptr() : nullptr,
                                       {places[0], places[1], places[2], places[3]}};
    const cuda::RouteInputs inputs{
        routed.expert_ids.const_data_ptr<int64_t>(),  routed.weights.const_data_ptr(),
        routed.probabilities.const_data_ptr(),        routed.logsumexp.const_data_ptr(),
        of_type_or_null<bool>(routed.padding_mask),   dweights.const_data_ptr(),
        cuda::address_or_null(dprobability_sum),      tokens / std::max<int64_t>(sequences, 1),
        cuda::address_or_null(dsquared_logsumexp_sum)};
    const auto arguments = route_arguments(probabilities, rule);
    if (rule.router_score == RouterScore::kSoftmax) {
      cuda::launch_route_backward(arguments, inputs, gradient, stream);
    } else {
      cuda::launch_route_backward_of_scores(arguments, score_kind(rule.router_score), inputs,
                                            gradient, stream);
    }
    return dlogits;
  }
};

}  // namespace

const RoutingKernels& RoutingKernels::cuda() {
  static const CudaRoutingKernels kernels;
  return kernels;
}

}  // namespace anabranch
