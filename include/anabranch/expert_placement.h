#pragma once

#include <algorithm>
#include <cstdint>

namespace anabranch {

/// Which rank owns which experts: contiguous blocks in rank order, the first
/// `num_experts % num_ranks` ranks holding one more. With more ranks than experts the last ranks
/// own none.
struct ExpertPlacement {
  int64_t num_experts = 0;
  int64_t num_ranks = 1;

  int64_t local_experts(int64_t rank) const {
    return num_experts / num_ranks + (rank < num_experts % num_ranks ? 1 : 0);
  }
  int64_t first_expert(int64_t rank) const {
    return rank * (num_experts / num_ranks) + std::min(rank, num_experts % num_ranks);
  }
};

}  // namespace anabranch
