#pragma once

#include <anabranch/communicator.h>
#include <anabranch/options.h>
#include <anabranch/routing.h>

namespace anabranch {

/// Losses and load of a whole batch.
struct AuxiliaryLosses {
  torch::Tensor balance_loss;                ///< [], undefined for routing from outside
  torch::Tensor z_loss;                      ///< [], undefined for routing from outside
  torch::Tensor importance_loss, load_loss;  ///< [], undefined but for Gate::kNoisyTopK
  torch::Tensor expert_load;                 ///< [E] int64
  torch::Tensor sequence_balance_loss;       ///< [], undefined without Routing::sequences
  torch::Tensor mean_probabilities;          ///< [E], see MoEOutput
};

/// The losses of all ranks' tokens, from each rank's `routing` and `counts` [E] of its assignments, by
/// one sum over ranks; the ranks' routing comes from the same kind of gate, or from outside. Of a layer with
/// such `options` the sum is as long either way, so that ranks that differ there come through it, and are told.
///
/// Gradients are scaled by the number of ranks: every rank is taken to use the losses in its own loss in
/// the same way, as losses are averaged over ranks. So backward needs no communication. Collective.
AuxiliaryLosses auxiliary_losses(const Routing& routing, const torch::Tensor& counts,
                                 const MoEOptions& options, Communicator& communicator);

/// Σ of those of the losses that `options` has coefficients for, but for the global balance loss; undefined where there
/// is none.
torch::Tensor weighted_sum(const AuxiliaryLosses& losses, const MoEOptions& options);

}  // namespace anabranch
