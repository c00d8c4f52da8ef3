#pragma once

#include <anabranch/options.h>
#include <torch/types.h>

#include "reference/router.h"

namespace anabranch::reference {

/// softmax(logits) and its k largest, ties to the lowest expert.
struct TopK {
  torch::Tensor probabilities;  ///< [T, E]
  torch::Tensor expert_ids;     ///< [T, top_k] int64, largest first
  torch::Tensor weights;        ///< [T, top_k]
};
TopK top_k_of_softmax(const torch::Tensor& logits, int64_t top_k, bool renormalize);

/// E · Σ_e (fraction of the assignments that go to e) · (mean probability of e); 0 without tokens.
torch::Tensor balance_loss(const torch::Tensor& probabilities, const torch::Tensor& expert_ids);
/// mean_t log(Σ_e exp(logits[t, e]))²; 0 without tokens.
torch::Tensor z_loss(const torch::Tensor& logits);

torch::Tensor activation(const torch::Tensor& x, Activation kind);

/// One expert: x [T, h] → [T, h]. up [n or 2n, h], down [h, n]; biases may be undefined.
torch::Tensor expert(const torch::Tensor& x, const torch::Tensor& up_weight,
                     const torch::Tensor& up_bias, const torch::Tensor& down_weight,
                     const torch::Tensor& down_bias, Activation kind, bool glu,
                     bool linear = false);

/// A whole MoE layer on one process: every expert computes every token, and a [T, E] matrix of
/// weights, zero where a token is not routed, adds them up. In the type of its parameters;
/// differentiable by LibTorch.
struct DenseMoE {
  torch::Tensor gate;         ///< [E, h]
  torch::Tensor up_weight;    ///< [E, n or 2n, h]
  torch::Tensor up_bias;      ///< [E, n or 2n] or undefined
  torch::Tensor down_weight;  ///< [E, h, n]
  torch::Tensor down_bias;    ///< [E, h] or undefined
  /// As above with E = 1, or undefined.
  torch::Tensor shared_up_weight, shared_up_bias, shared_down_weight, shared_down_bias;

  torch::Tensor shared_gate;  ///< [1, h] or undefined

  RoutingFormula routing;
  Activation activation = Activation::kGeluTanh;
  bool glu = false;
  /// No activation: what goes in comes out. With everything squared the layer and its gradients are
  /// then the sums of squares of their terms (activations are no steeper than 1.13), or more: for the
  /// shared expert's sigmoid, below 1 and less steep, 1 + its argument stands.
  bool linear = false;

  struct Result {
    torch::Tensor output;  ///< [T, h]
    torch::Tensor balance_loss, z_loss;
    torch::Tensor expert_ids, weights;  ///< [T, top_k]
    torch::Tensor load;                 ///< [E] int64
  };
  Result forward(const torch::Tensor& x) const;
  /// With routing from outside: no losses.
  Result forward(const torch::Tensor& x, const torch::Tensor& expert_ids,
                 const torch::Tensor& weights) const;

  /// How far x is from a point where the result is not smooth: the smallest change of a token's logits
  /// that changes its experts (not without a gate: routing from outside), and with ReLU the smallest
  /// distance of a hidden value from 0.
  double margin(const torch::Tensor& x, bool with_gate) const;

 private:
  torch::Tensor mix(const torch::Tensor& x, const torch::Tensor& expert_ids,
                    const torch::Tensor& weights) const;
};

}  // namespace anabranch::reference
