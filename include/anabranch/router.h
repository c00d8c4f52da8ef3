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

  /// Sums over this rank's tokens that the auxiliary losses are made of; differentiable.
  torch::Tensor probability_sum;        ///< [E] Σ_t softmax(logits)[t, e]
  torch::Tensor squared_logsumexp_sum;  ///< [] Σ_t logsumexp(logits[t])²
  /// [] int64: first token whose logits hold NaN or Inf, or -1. Such a token is never routed: the
  /// exchange refuses the step on every rank.
  torch::Tensor first_nonfinite_token;
};

/// Linear gate, softmax, top-k: the k largest probabilities of a token, ties to the lowest expert.
class RouterImpl : public torch::nn::Module {
 public:
  explicit RouterImpl(const MoEOptions& options);

  /// `x`: [T, h] of any floating type; the gate computes in fp32 (fp64 for fp64 input).
  Routing forward(const torch::Tensor& x);

  torch::Tensor weight;  ///< [E, h] fp32 (fp64 for fp64 layers)

 private:
  MoEOptions options_;
};
TORCH_MODULE(Router);

/// What Router does, with a gate's `weight` [E, h] that lies elsewhere. `training`: with jitter.
Routing route_tokens(const torch::Tensor& x, const torch::Tensor& weight, const MoEOptions& options,
                     bool training);

/// Softmax and top-k of given logits [T, E] (fp32 or fp64), differentiable in the logits.
Routing route(const torch::Tensor& logits, int64_t top_k, bool renormalize);

}  // namespace anabranch
