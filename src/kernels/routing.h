#pragma once

#include <anabranch/routing.h>
#include <torch/types.h>

#include <cstdint>

#include "kernels/kernels.h"

namespace anabranch {

struct RouteResult {
  torch::Tensor expert_ids;     ///< [T, k] int64, best choice first; −1 of padding
  torch::Tensor weights;        ///< [T, k], NaN for a token that is not routed, 0 for id −1
  torch::Tensor probabilities;  ///< [T, E] softmax, or other scores over their sum; 0 of padding
  torch::Tensor logsumexp;      ///< [T], 0 of padding
  torch::Tensor counts;         ///< [E] int64
  torch::Tensor first_nonfinite_token;  ///< [] int64, -1 if none
  torch::Tensor padding_mask;           ///< [T] bool; undefined: no token is padding
};

/// Over the tokens.
struct RoutingSums {
  torch::Tensor probabilities;      ///< [E]
  torch::Tensor squared_logsumexp;  ///< []
  torch::Tensor of_sequences = {};  ///< [S, E]: the probabilities', in each sequence
};

/// Of a batch, and their gradients in its sums.
struct BatchLosses {
  torch::Tensor expert_load;    ///< [E] int64
  torch::Tensor balance;        ///< []
  torch::Tensor z;              ///< []
  torch::Tensor balance_slope;  ///< [E] fp64: in the probability sums
  torch::Tensor z_slope;        ///< [] fp64: in the sum of squared logsumexp
};

/// The softmax's largest are the largest logits: no more is needed than those.
inline bool is_plain(const RoutingRule& rule, const RoutingConditions& conditions) {
  return rule.router_score == RouterScore::kSoftmax && rule.routing_scale == 1 &&
         rule.expert_groups == 1 && !conditions.expert_bias.defined() &&
         !conditions.expert_ids.defined() && !conditions.padding_mask.defined();
}

/// Of how many of its best experts a group's score is the sum.
inline int64_t summed_of_group(const RoutingRule& rule) {
  switch (rule.group_score) {
    case GroupScore::kMaximum:
      return 1;
    case GroupScore::kTopTwoSum:
      return 2;
    case GroupScore::kTopShareSum:
    case GroupScore::kTopShareLogitSum:
      break;
  }
  return rule.top_k / rule.top_groups;
}

/// The experts are chosen by their logits, in the order of which their scores are.
inline bool chooses_by_logits(const RoutingRule& rule, const torch::Tensor& expert_bias) {
  return !expert_bias.defined() &&
         (rule.expert_groups == 1 || rule.group_score == GroupScore::kTopShareLogitSum);
}

/// What a gate has to say about the choice of experts.
enum class Choice {
  kByRule,
  kByBiasedLogits,  ///< RoutingConditions::expert_bias is of the logits, not of the scores
  kMade,  ///< RoutingConditions::expert_ids are valid for every token, and become the result's
};

/// From logits [T, E], fp32 or fp64, to experts, weights and the sums of the losses.
class RoutingKernels : public Kernels<RoutingKernels> {
 public:
  static const RoutingKernels& cpu();
  static const RoutingKernels& cuda();

  /// `conditions` are contiguous and on the logits' device; of a choice that is given, ids of no expert
  /// are handed on and get the weight 0. On a GPU the fp32 logits of a plain rule may be sums, of [T, 3, E].
  virtual RouteResult route(const torch::Tensor& logits, const RoutingRule& rule,
                            const RoutingConditions& conditions,
                            Choice choice = Choice::kByRule) const = 0;
  /// Of probabilities [T, E] and logsumexp [T], and of S sequences of equal length, none with 0.
  virtual RoutingSums routing_sums(const torch::Tensor& probabilities,
                                   const torch::Tensor& logsumexp, int64_t sequences = 0) const = 0;
  /// [S, E] of type `dtype`, fp32 or fp64: how often each expert is among the ids [T, k] of each of S ≥ 1 sequences of
  /// equal length. What is no expert's id counts for nothing.
  virtual torch::Tensor sequence_counts(const torch::Tensor& expert_ids, int64_t sequences,
                                        int64_t experts, torch::Dtype dtype) const = 0;
  /// [2E + 2] fp64: counts [E] int64, tokens, and the two sums.
  virtual torch::Tensor batch_sums(const torch::Tensor& counts, int64_t tokens,
                                   const RoutingSums& sums) const = 0;
  /// From such sums, over all ranks: balance = E / k · Σ chosen · probability sum / tokens², with
  /// `chosen` [E] fp64, k choices a token; z = Σ logsumexp² / tokens. Both of type `dtype`, fp32 or
  /// fp64; 0 where there are no tokens.
  virtual BatchLosses batch_losses(const torch::Tensor& sums, const torch::Tensor& chosen,
                                   int64_t top_k, torch::Dtype dtype) const = 0;
  /// The same of one rank alone, whose own counts and sums are the batch's; of the type of `sums`.
  virtual BatchLosses losses_of_one(const torch::Tensor& counts, int64_t tokens,
                                    const RoutingSums& sums, int64_t top_k) const = 0;
  /// Of Routing::bias_histogram; `scores` [T, E] are what the biases are added to.
  virtual torch::Tensor bias_histogram(const torch::Tensor& scores, const RoutingRule& rule,
                                       const RoutingConditions& conditions) const = 0;
  /// [E] what is to be added to logits [T, E] so that the softmax over the experts, every token once, gives each
  /// expert as much as any other: log of the columns' factors in Sinkhorn's scaling of exp(logits) to equal sums of
  /// rows and of columns, by rounds as kernels/sinkhorn.h has them; 0 on average. `left_out` [T] bool, may be undefined:
  /// tokens that count for nothing, as do those with a logit that is not finite.
  virtual torch::Tensor sinkhorn_bias(const torch::Tensor& logits,
                                      const torch::Tensor& left_out) const = 0;
  /// Of each sequence of n tokens, all of one length but for padding, the ⌈n · top_k / E⌉ that score highest with each
  /// expert, of equal ones the first: [T, E] int64, e in column e where expert e takes the token, or −1. Scores are the
  /// softmax of logits [T, E], or of other rules the logits, in whose order they are; NaN counts as padding, for its expert.
  virtual torch::Tensor choose_tokens(const torch::Tensor& logits, const RoutingRule& rule,
                                      const torch::Tensor& padding_mask,
                                      int64_t sequences) const = 0;
  /// dlogits [T, E] from the gradients of the weights [T, k], of the probability sum [E], or of that of
  /// each of S sequences [S, E], and of the sum of squared logsumexp [], of which the sums' may be
  /// undefined: zero. Of `routed` ids, weights, logsumexp and padding are read, and `probabilities`, in
  /// the place of which scores other than softmax take the logits. `split`: the fp32 result apart as
  /// GateKernels::split has it with kSplitGradient, side by side.
  virtual torch::Tensor route_backward(const RouteResult& routed, const RoutingRule& rule,
                                       const torch::Tensor& dweights,
                                       const torch::Tensor& dprobability_sum,
                                       const torch::Tensor& dsquared_logsumexp_sum,
                                       bool split = false) const = 0;
};

}  // namespace anabranch
