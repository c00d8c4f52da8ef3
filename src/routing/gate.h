#pragma once

#include <torch/types.h>

namespace anabranch {

/// logits [T, E] = x [T, h] · weight [E, h]ᵀ in the weight's type, fp32 or fp64; differentiable.
///
/// Rows of 16 bits on a GPU are multiplied as they are, without an fp32 copy: the weight, and in backward
/// the logits' gradient, as sums of such numbers, whose products fit into fp32.
torch::Tensor gate_logits(const torch::Tensor& x, const torch::Tensor& weight);

// The same for an autograd function that has more to do than this product.

/// What gate_product finds.
struct GateProduct {
  torch::Tensor logits;        ///< [T, E]; of bf16 on a GPU [T, 3, E], whose sum they are
  torch::Tensor split_weight;  ///< for gate_gradient; undefined where nothing was split
};
GateProduct gate_product(const torch::Tensor& x, const torch::Tensor& weight);

struct GateGradient {
  torch::Tensor x;       ///< [T, h] of its type; undefined unless wanted
  torch::Tensor weight;  ///< [E, h]; undefined unless wanted
};
/// `dlogits`: [T, E], or where the weight was split [T, 4, E], see kSplitGradient.
GateGradient gate_gradient(const torch::Tensor& dlogits, const torch::Tensor& x,
                           const torch::Tensor& weight, const torch::Tensor& split_weight,
                           bool x_wanted, bool weight_wanted);

}  // namespace anabranch
