#pragma once

#include <torch/types.h>

namespace anabranch {

/// Rounds of sinkhorn_bias: a number that does not depend on the logits, so that nobody waits for a GPU.
constexpr int64_t kSinkhornRounds = 20;

/// [E] what is to be added to logits [T, E] so that the softmax over the experts, every token once, gives each
/// expert as much as any other: log of the columns' factors in Sinkhorn's scaling of exp(logits) to equal sums of
/// rows and of columns, after kSinkhornRounds rounds; 0 on average. `left_out` [T] bool: tokens that count for
/// nothing, as do those with a logit that is not finite.
torch::Tensor sinkhorn_bias(const torch::Tensor& logits, const torch::Tensor& left_out);

}  // namespace anabranch
