#pragma once

#include <anabranch/options.h>
#include <torch/types.h>

namespace anabranch::reference {

/// How logits become experts and weights, by the formulas of the papers and of transformers' OLMoE,
/// Mixtral, Qwen3-MoE and DeepSeek-V3, in plain LibTorch operations.
struct RoutingFormula {
  int64_t top_k = 1;
  bool renormalize = true;
  RouterScore score = RouterScore::kSoftmax;
  double scale = 1;
  int64_t groups = 1;
  int64_t top_groups = 1;
  GroupScore group_score = GroupScore::kTopTwoSum;
  torch::Tensor expert_bias = {};  ///< [E] or undefined
};
RoutingFormula formula_of(const MoEOptions& options, const torch::Tensor& expert_bias = {});

struct Choice {
  torch::Tensor probabilities;  ///< [T, E] softmax, or other scores over their sum
  torch::Tensor expert_ids;     ///< [T, top_k] int64, best first, ties to the lowest
  torch::Tensor weights;        ///< [T, top_k]
  /// [T] how clear the choice and its order are: the least distance between two of what experts are
  /// chosen by, of scores in proportion to what they are rounded by.
  torch::Tensor margin;
};
Choice choose(const torch::Tensor& logits, const RoutingFormula& formula);

/// [E] Σ over tokens of P(x, i) (Shazeer et al. 2017, eq. 9), one token and expert after another.
torch::Tensor smooth_load(const torch::Tensor& clean, const torch::Tensor& noisy,
                          const torch::Tensor& deviation, int64_t top_k);

/// Variance over squared mean.
torch::Tensor squared_variation(const torch::Tensor& values);

}  // namespace anabranch::reference
