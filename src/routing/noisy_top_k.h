#pragma once

#include <anabranch/routing.h>

namespace anabranch {

/// What the deviation of the noise is at least (the authors' code, noise_epsilon).
constexpr double kLeastDeviation = 1e-2;

/// [E] Σ over tokens of the weights of each expert; differentiable.
torch::Tensor weights_per_expert(const Routing& routing, int64_t num_experts);

/// [E] Σ over tokens of the probability that an expert is among the chosen when its own noise alone
/// is drawn anew: Φ((logit − threshold) / deviation), the threshold the k-th largest of the other
/// experts' noisy logits (arXiv:1701.06538, eq. 8 and 9). All [T, E] but `expert_ids` [T, top_k], −1 of
/// padding, and `padding_mask` [T] or undefined; differentiable.
torch::Tensor smooth_load(const torch::Tensor& logits, const torch::Tensor& noisy,
                          const torch::Tensor& deviation, const torch::Tensor& expert_ids,
                          const torch::Tensor& padding_mask);

}  // namespace anabranch
