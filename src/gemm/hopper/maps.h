#pragma once

#include <cuda.h>

#include "gemm/tiles/problem.h"

namespace anabranch::hopper {

using namespace tiles;

/// See rows_map.
constexpr int kRowsEnd = 1 << 30;
constexpr int kRowsWrap = 1 << 30;

/// Rows that are read by an index, where TMA cannot.
struct IndexedRows {
  const void* rows = nullptr;      ///< [R, pitch]
  const int64_t* index = nullptr;  ///< [P]
  int32_t pitch = 0;
};

/// See rows_map and weight_map; c of kStore alone, and in the place of a or b what is gathered.
struct Maps {
  CUtensorMap a = {};
  CUtensorMap b = {};
  CUtensorMap c = {};
  IndexedRows gathered = {};
};

}  // namespace anabranch::hopper
