#include "communicator/mpi/group.h"

#include <algorithm>
#include <numeric>
#include <utility>

namespace anabranch {

MpiGroup::MpiGroup(int32_t id, std::vector<int> members, int world_size)
    : id(id), members(std::move(members)) {
  std::vector<int> all(world_size);
  std::iota(all.begin(), all.end(), 0);
  is_world = this->members == all;
}

std::string MpiGroup::describe(const std::vector<int>& world_ranks) const {
  constexpr size_t kNamed = 16;
  std::string text = is_world ? "rank" : "world rank";
  text += world_ranks.size() == 1 ? " " : "s ";
  for (size_t i = 0; i < std::min(world_ranks.size(), kNamed); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(world_ranks[i]);
  }
  if (world_ranks.size() > kNamed) {
    text += " and " + std::to_string(world_ranks.size() - kNamed) + " others";
  }
  return text;
}

std::vector<int> MpiGroup::ranks_of(const std::vector<int>& world_ranks) const {
  std::vector<int> ranks;
  for (const int world_rank : world_ranks) {
    const auto member = std::find(members.begin(), members.end(), world_rank);
    if (member != members.end()) {
      ranks.push_back(static_cast<int>(member - members.begin()));
    }
  }
  return ranks;
}

}  // namespace anabranch
