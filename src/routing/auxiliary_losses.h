#pragma once

#include <anabranch/router.h>

namespace anabranch {

/// Losses and load of a whole batch.
struct AuxiliaryLosses {
  torch::Tensor balance_loss;  ///< [], undefined for routing from outside
  torch::Tensor z_loss;        ///< [], undefined for routing from outside
  torch::Tensor expert_load;   ///< [E] int64
};

/// What one rank adds to the whole batch: one fp64 vector, so that one sum over ranks does for all.
torch::Tensor batch_sums(const Routing& routing, int64_t num_experts);

/// The losses, from `batch_sums` summed over the ranks.
AuxiliaryLosses auxiliary_losses(const torch::Tensor& sums, int64_t num_experts, int64_t top_k,
                                 torch::Dtype dtype);

}  // namespace anabranch
