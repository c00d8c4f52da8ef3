#pragma once

#include <anabranch/expert_placement.h>
#include <torch/types.h>

namespace anabranch {

/// A routing among experts as one among places, S slots for each of a token's choices: an assignment to an expert
/// in slices is one to each of them, of whom there are S at most.
class PlacedRouting {
 public:
  explicit PlacedRouting(const ExpertPlacement& placement);

  /// Whether some slots are none, where the experts are in different numbers of slices.
  bool may_skip() const { return may_skip_; }
  /// [T, top_k] experts, where `may_skip` with −1 for none → [T, top_k · S] places, −1 for none. Of ids that are
  /// not valid: any.
  torch::Tensor ids(const torch::Tensor& expert_ids, bool may_skip) const;
  /// [T, top_k] → [T, top_k · S], differentiable.
  torch::Tensor weights(const torch::Tensor& of_choices) const;
  /// [places] assignments → [E], each counted once.
  torch::Tensor counts_of_experts(const torch::Tensor& counts) const;

 private:
  const torch::Tensor& on(torch::Device device, torch::Tensor& table) const;

  int64_t num_experts_;
  int64_t slots_;  ///< S
  bool may_skip_ = false;
  // On the device of the last call.
  mutable torch::Tensor
      places_;  ///< [E + 1, S] by slice, −1 for none; the last row is that of no expert
  mutable torch::Tensor first_slices_;  ///< [E]
};

}  // namespace anabranch
