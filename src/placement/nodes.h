#pragma once

#include <anabranch/communicator.h>
#include <anabranch/expert_placement.h>
#include <torch/types.h>

#include <string>
#include <vector>

namespace anabranch {

/// [W] the node of each rank, numbered. `own`: this rank's; empty: what the launcher says (discover_rank). Collective.
std::vector<int> nodes_of_ranks(Communicator& communicator, const std::string& own = {});

/// [E] bool, in host memory: the experts of which all that there is lies on the node of `rank`.
torch::Tensor experts_of_node(const ExpertPlacement& placement, const std::vector<int>& node_of,
                              int64_t rank);

}  // namespace anabranch
