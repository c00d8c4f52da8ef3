#pragma once

#include <algorithm>
#include <cstdint>

namespace anabranch {

/// Rows of `width` elements that make a parallel task worth its start.
inline int64_t rows_per_task(int64_t width) {
  constexpr int64_t kElementsPerTask = 32 * 1024;
  return std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, width));
}

}  // namespace anabranch
