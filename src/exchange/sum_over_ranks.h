#pragma once

#include <anabranch/communicator.h>

namespace anabranch {

/// Σ over ranks of `tensor`, the same on every rank. The gradient is scaled by the number of ranks:
/// every rank is taken to use the sum in its own loss in the same way, as losses are averaged over
/// ranks. So backward needs no communication. Collective.
torch::Tensor sum_over_ranks(const torch::Tensor& tensor, Communicator& communicator);

}  // namespace anabranch
