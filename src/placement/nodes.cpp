#include "placement/nodes.h"

#include <ATen/ops/ones.h>
#include <anabranch/rank_discovery.h>

#include "communicator/agreement.h"
#include "communicator/hierarchical/node_layout.h"

namespace anabranch {

std::vector<int> nodes_of_ranks(Communicator& communicator, const std::string& own) {
  const NodeLayout layout(
      all_gather_strings(communicator, own.empty() ? discover_rank().node : own));
  std::vector<int> nodes;
  for (int rank = 0; rank < communicator.size(); ++rank) nodes.push_back(layout.node_of(rank));
  return nodes;
}

torch::Tensor experts_of_node(const ExpertPlacement& placement, const std::vector<int>& node_of,
                              int64_t rank) {
  auto of_node = at::ones({placement.num_experts}, at::kBool);
  for (int64_t holder = 0; holder < placement.num_ranks; ++holder) {
    if (node_of[holder] == node_of[rank]) continue;
    for (int64_t local = 0; local < placement.local_experts(holder); ++local) {
      of_node[placement.at(holder, local).expert] = false;
    }
  }
  return of_node;
}

}  // namespace anabranch
