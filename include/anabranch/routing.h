#pragma once

#include <anabranch/options.h>
#include <torch/types.h>

namespace anabranch {

/// Sums over each of S sequences, without padding.
struct SequenceSums {
  torch::Tensor probability_sum;  ///< [S, E] as Routing's; differentiable
  torch::Tensor counts;           ///< [S, E] assignments of each expert, of the sums' type
  torch::Tensor tokens;           ///< [S] of the sums' type
};

/// Where this rank's T tokens go. Made by a Router, or handed in by the caller, who fills
/// `expert_ids` and `weights` and leaves the rest undefined.
struct Routing {
  torch::Tensor expert_ids;  ///< [T, top_k] int64, distinct within a token
  torch::Tensor weights;     ///< [T, top_k] fp32 (fp64 for fp64 layers), differentiable
  torch::Tensor counts;      ///< [E] int64, this rank's assignments per expert
  /// Some of `expert_ids` may be −1: no assignment, whatever its weight; nothing is sent or computed
  /// for it. A token may have none at all, and then gets zeros.
  bool may_skip = false;

  /// [] int64: tokens that are no padding; undefined: all.
  torch::Tensor num_tokens;

  /// Sums over this rank's tokens, without padding, that the auxiliary losses are made of; differentiable.
  /// [E] Σ_t p[t, e], p the softmax of the token's logits, or its sigmoid scores over their sum.
  torch::Tensor probability_sum;
  torch::Tensor squared_logsumexp_sum;  ///< [] Σ_t logsumexp(logits[t])²
  torch::Tensor importance;             ///< kNoisyTopK: [E] Σ of the weights of each expert
  /// kNoisyTopK: [E] Σ_t probability that e is chosen when its noise alone is drawn anew.
  torch::Tensor smooth_load;
  /// kGShard: [E] int64, tokens whose best expert is e; the balance loss counts these alone.
  torch::Tensor first_counts;
  /// [] int64: first token whose logits hold NaN or Inf, or -1. Such a token is never routed: its
  /// weights are NaN, and the exchange refuses the step on every rank.
  torch::Tensor first_nonfinite_token;
  SequenceSums sequences;  ///< where they were asked for
  /// [E, kBiasBins] int64, where it was asked for: how many of this rank's tokens would have gone to an expert by its
  /// bias alone if that had been just above a bin's, between min(bias) − 1 and max(bias) + 1.
  torch::Tensor bias_histogram;
};

/// Bins of Routing::bias_histogram (Kimi K3's technical report, appendix D).
constexpr int64_t kBiasBins = 1000;

/// In RoutingConditions::expert_ids.
constexpr int64_t kOwnChoice = -2;

/// What the choice of experts takes besides logits; undefined where there is none.
struct RoutingConditions {
  /// [E] of the logits' type, added to the scores for the choice alone.
  torch::Tensor expert_bias;
  /// [T, top_k] int64: the choice itself, −1 for none; distinct within a token, which the exchange checks.
  /// Weights and losses are then the router's own for it, with their gradients (routing replay). A token
  /// whose first id is kOwnChoice is routed as if none were given.
  torch::Tensor expert_ids;
  /// [T] bool: true is padding: it goes nowhere and counts for nothing.
  torch::Tensor padding_mask;
  /// The tokens are so many sequences of equal length, of which Routing::sequences is wanted; 0: is not. Expert
  /// choice takes 0 as one.
  int64_t sequences = 0;
  bool bias_histogram =
      false;  ///< whether Routing::bias_histogram is wanted; with an `expert_bias`
  /// [E] bool: experts that MoEOptions::cross_node_limit does not count, those of this rank's node. A layer fills it in.
  torch::Tensor near_experts = {};
};

/// How logits become experts and weights: the members of MoEOptions with these names.
struct RoutingRule {
  int64_t top_k = 1;                                 ///< experts a token goes to
  bool renormalize = true;                           ///< a token's weights sum to 1
  RouterScore router_score = RouterScore::kSoftmax;  ///< what makes a logit a score
  double routing_scale = 1.0;                       ///< the weights are multiplied by it in the end
  int64_t expert_groups = 1;                        ///< the experts lie in so many, of equal size
  int64_t top_groups = 1;                           ///< a token's experts are of its best so many
  GroupScore group_score = GroupScore::kTopTwoSum;  ///< by which groups are the best
};

}  // namespace anabranch
