#pragma once

#include <cuda.h>

#include "gemm/tiles/problem.h"

namespace anabranch::hopper {

using namespace tiles;

/// See rows_map.
constexpr int kRowsEnd = 1 << 30;
constexpr int kRowsWrap = 1 << 30;

/// See rows_map and weight_map; c of kStore alone.
struct Maps {
  CUtensorMap a;
  CUtensorMap b;
  CUtensorMap c = {};
};

}  // namespace anabranch::hopper
