#pragma once

#include <torch/types.h>

namespace anabranch {

/// logits [T, E] = x [T, h] · weight [E, h]ᵀ in the weight's type, fp32 or fp64; differentiable.
///
/// bf16 rows on a GPU are multiplied as they are, without an fp32 copy: the weight, and in backward
/// the logits' gradient, as sums of bf16 numbers, whose products with bf16 fit into fp32.
torch::Tensor gate_logits(const torch::Tensor& x, const torch::Tensor& weight);

}  // namespace anabranch
