#pragma once

#include <anabranch/communicator.h>
#include <anabranch/expert_placement.h>
#include <torch/types.h>

#include <cstdint>
#include <vector>

namespace anabranch {

/// A row that goes from one place to another.
struct Move {
  int64_t from_rank, to_rank;    ///< of the communicator
  int64_t from_place, to_place;  ///< over all ranks
};

/// Between placements of whole experts, as many of them on each rank; by `to_place`. `holders`: [places] the rank that has
/// the row of each.
std::vector<Move> moves_between(const ExpertPlacement& from, const ExpertPlacement& to,
                                const std::vector<int64_t>& holders);

/// How many experts lie at another place.
int64_t moved_experts(const ExpertPlacement& from, const ExpertPlacement& to);

/// A tensor whose rows are of places, and which of them move.
struct MovingRows {
  torch::Tensor tensor;
  int64_t first_place = 0;  ///< of its rows
  std::vector<Move> moves;
};

/// Moves rows of all tensors to where they are to lie, by one exchange. Tensors keep their shapes and addresses.
/// Collective.
void move_rows(Communicator& communicator, const std::vector<MovingRows>& tensors);

}  // namespace anabranch
