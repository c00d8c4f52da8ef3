#pragma once

#include <anabranch/options.h>
#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

namespace anabranch {

/// Where this rank's T tokens go. Made by a Router, or handed in by the caller, who fills
/// `expert_ids` and `weights` and leaves the rest undefined.
struct Routing {
  torch::Tensor expert_ids;  ///< [T, top_k] int64, distinct within a token
  torch::Tensor weights;     ///< [T, top_k] fp32 (fp64 for fp64 layers), differentiable
  torch::Tensor counts;      ///< [E] int64, this rank's assignments per expert
  /// Some of `expert_ids` may be −1: no assignment, whatever its weight; nothing is sent or computed
  /// for it. A token may have none at all, and then gets zeros.
  bool may_skip = false;

  /// Sums over this rank's tokens that the auxiliary losses are made of; differentiable.
  /// [E] Σ_t p[t, e], p the softmax of the token's logits, or its sigmoid scores over their sum.
  torch::Tensor probability_sum;
  torch::Tensor squared_logsumexp_sum;  ///< [] Σ_t logsumexp(logits[t])²
  torch::Tensor importance;             ///< kNoisyTopK: [E] Σ of the weights of each expert
  /// kNoisyTopK: [E] Σ_t probability that e is chosen when its noise alone is drawn anew.
  torch::Tensor smooth_load;
  /// kGShard: [E] int64, tokens whose best expert is e; the balance loss counts these alone.
  torch::Tensor first_counts;
  /// [] int64: first token whose logits hold NaN or Inf, or -1. Such a token is never routed: the
  /// exchange refuses the step on every rank.
  torch::Tensor first_nonfinite_token;
};

/// What a router computes with: undefined where its options have none.
struct RouterParameters {
  torch::Tensor weight;        ///< [E, h] fp32 (fp64 for fp64 layers)
  torch::Tensor noise_weight;  ///< the same, of the noise of Gate::kNoisyTopK
  torch::Tensor expert_bias;   ///< [E] of the weight's type, a buffer
};

/// Linear gate, scores, top-k: `options.gate` and what follows it. Ties go to the lowest expert.
/// Noise is drawn from LibTorch's generator of the device: the same seed, the same routing.
class RouterImpl : public torch::nn::Module {
 public:
  explicit RouterImpl(const MoEOptions& options);

  /// `x`: [T, h] of any floating type; the gate computes in fp32 (fp64 for fp64 input).
  Routing forward(const torch::Tensor& x);

  /// Adds `rate` to the bias of every expert with less than the mean of `expert_load` [E], takes it
  /// from those with more (arXiv:2408.15664, algorithm 1; DeepSeek-V3 trains with 0.001). The load is
  /// that of all ranks which hold this router, so that the bias stays the same on each.
  /// Throws InputError without `options.expert_bias`, and for another shape or a negative rate.
  void update_expert_bias(const torch::Tensor& expert_load, double rate);

  RouterParameters router_parameters() const { return {weight, noise_weight, expert_bias}; }

  torch::Tensor weight;        ///< [E, h] fp32 (fp64 for fp64 layers)
  torch::Tensor noise_weight;  ///< the same, of the noise; undefined unless kNoisyTopK
  torch::Tensor expert_bias;   ///< [E] of the weight's type, a buffer; undefined without the option

 private:
  MoEOptions options_;
};
TORCH_MODULE(Router);

/// What Router does, with parameters that lie elsewhere. `training`: with jitter, noise and chance.
Routing route_tokens(const torch::Tensor& x, const RouterParameters& parameters,
                     const MoEOptions& options, bool training);

/// What Router::update_expert_bias does, with a bias that lies elsewhere.
void update_expert_bias(torch::Tensor& expert_bias, const torch::Tensor& expert_load, double rate);

/// How logits become experts and weights: the members of MoEOptions with these names.
struct RoutingRule {
  int64_t top_k = 1;
  bool renormalize = true;
  RouterScore router_score = RouterScore::kSoftmax;
  double routing_scale = 1.0;
  int64_t expert_groups = 1;
  int64_t top_groups = 1;
  GroupScore group_score = GroupScore::kTopTwoSum;
};

/// Scores of given logits [T, E] (fp32 or fp64), the choice among them, the weights of those chosen:
/// w = routing_scale · s / (Σ of the chosen s + 10⁻²⁰) or routing_scale · s. `expert_bias` [E], of the
/// logits' type, is added to the scores for the choice alone. Differentiable in the logits.
/// OLMoE, Mixtral, Qwen3-MoE: softmax, renormalised or not. DeepSeek-V3: sigmoid, bias, groups, scale;
/// there an expert outside the chosen groups is never taken, however low the biased scores inside.
Routing route(const torch::Tensor& logits, const RoutingRule& rule,
              const torch::Tensor& expert_bias = {});

/// Softmax and the top_k of it.
Routing route(const torch::Tensor& logits, int64_t top_k, bool renormalize);

}  // namespace anabranch
