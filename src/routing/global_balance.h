#pragma once

#include <anabranch/communicator.h>
#include <torch/types.h>

namespace anabranch {

/// Whether this forward is run again by a backward, as checkpointing does.
bool is_recomputing();

/// [E] int64: assignments of each expert in the step so far, over all replicas of the experts. Those of one forward,
/// `own` [E] int64 of a group, are added to `before` in training, but not where a backward runs it again: it has been
/// counted. In evaluation they are `own` alone. `replicas` may be null; collective over them but for what is run again.
torch::Tensor load_of_step(torch::Tensor& before, const torch::Tensor& own, bool training,
                           Communicator* replicas);

/// [] E · Σ_e F_e · P_e, F the shares of `load` [E] int64, P `mean_probabilities` [E]; differentiable in these.
torch::Tensor global_balance_loss(const torch::Tensor& mean_probabilities,
                                  const torch::Tensor& load);

}  // namespace anabranch
