#pragma once

#include <anabranch/expert_placement.h>

#include <cstdint>
#include <vector>

namespace anabranch {

/// Where experts are to lie, and what it is good for.
struct MoveChoice {
  ExpertPlacement placement;
  double before = 1;  ///< the fullest rank's load over the mean, 1 where there is none
  double after = 1;
};

/// `from`, of whole experts, with some of them swapped between ranks, each of which holds as many as before: as long
/// as that takes load off the fullest rank, an expert of its own for another rank's of the same node, and where no
/// such swap does, for any other's. `from` itself where all swaps together take less than `least_gain` of the fullest
/// rank's load. `loads` [E]; `node_of` [W].
MoveChoice choose_moves(const std::vector<int64_t>& loads, const ExpertPlacement& from,
                        const std::vector<int>& node_of, double least_gain);

}  // namespace anabranch
