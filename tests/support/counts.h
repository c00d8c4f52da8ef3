#pragma once

#include <cstdint>
#include <vector>

#include "support/random.h"

namespace anabranch::test {

/// Rows from each rank to each: counts[source][destination].
using Counts = std::vector<std::vector<int64_t>>;

/// Up to `largest`; about a third of them are 0.
inline Counts random_counts(Random& random, int size, int64_t largest) {
  Counts counts(size, std::vector<int64_t>(size));
  for (auto& row : counts) {
    for (auto& count : row) {
      count = random.chance(0.3) ? 0 : random.integer(0, largest);
    }
  }
  return counts;
}

}  // namespace anabranch::test
