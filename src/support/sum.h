#pragma once

#include <cstdint>
#include <numeric>
#include <vector>

namespace anabranch {

/// Of counts: rows or assignments, of a rank or of all.
inline int64_t sum(const std::vector<int64_t>& counts) {
  return std::accumulate(counts.begin(), counts.end(), int64_t{0});
}

}  // namespace anabranch
