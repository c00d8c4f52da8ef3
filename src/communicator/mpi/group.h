#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace anabranch {

/// What a rank is in that has come to the end of its program, in the place of a group's id.
inline constexpr int32_t kNoMpiGroup = 0;

/// Ranks that communicate, by their number in MPI_COMM_WORLD: the "world rank" of messages.
struct MpiGroup {
  MpiGroup(int32_t id, std::vector<int> members, int world_size);

  int32_t id;  ///< differs between groups that share a rank
  std::vector<int> members;
  bool is_world;  ///< members[r] = r for all ranks of the world

  /// "rank 2", "ranks 2, 3"; "world rank 2" in a group whose own numbers are others.
  std::string describe(const std::vector<int>& world_ranks) const;
  /// Numbers within the group of those that belong to it.
  std::vector<int> ranks_of(const std::vector<int>& world_ranks) const;
};

}  // namespace anabranch
