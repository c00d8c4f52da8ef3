#pragma once

#include <torch/types.h>

namespace train_lm {

struct TokenLoss {
  torch::Tensor sum;  ///< [] Σ over tokens of −ln p(target), in fp32 at least; zero for no tokens
  torch::Tensor scaled;  ///< [] `scale` times that, with gradients
};

/// Cross-entropy of logits hidden · headᵀ, computed in chunks of tokens of which one at a time has its logits
/// in memory: `hidden` [.., h], `head` [V, h], `targets` [..] int64. Where gradients are recorded, those of
/// hidden and head are computed in the same pass; what comes to `scaled` in backward multiplies them.
TokenLoss cross_entropy(const torch::Tensor& hidden, const torch::Tensor& head,
                        const torch::Tensor& targets, double scale);

}  // namespace train_lm
