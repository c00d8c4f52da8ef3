#pragma once

#include <cuda.h>

#include <cstdint>

#include "kernels/cuda/launch.h"

namespace anabranch::hopper {

/// See rows_map.
constexpr int kRowsEnd = 1 << 30;
constexpr int kRowsWrap = 1 << 30;

/// An expert and its rows.
struct Group {
  int32_t expert;
  int32_t first_row;
  int32_t rows;
};

/// c [m, n] = a [m, k] · b [k, n] for each expert, whose rows are m (forward, dgrad) or k (wgrad). How
/// many each has, the host need not know.
struct Problem {
  int32_t m;
  int32_t n;  // with GLU, of the activation
  int32_t k;
  int32_t band;  // tiles, see TileScheduler
  int32_t experts;
  // In GPU memory, see ExpertCounts.
  const int64_t* first_row;
  const int64_t* longest_first;

  float* sum;  // kAccumulate: [experts, m, n]

  // Of the epilogues with an activation.
  cuda::ActivationKind activation;
  const void* hidden;    // kActivateBackward: [P, n] (GLU: [P, 2n], gate then up)
  void* hidden_out;      // the hidden rows, or their gradient; may be hidden
  void* activated;       // [P, n]
  const float* weights;  // kActivateBackward: routing weights [P], null for 1
  float* dots;           // and [P, ⌈n / 64⌉]: ⟨gradient, activation⟩ of 64 columns each
};

/// See rows_map and weight_map; c of kStore alone.
struct Maps {
  CUtensorMap a;
  CUtensorMap b;
  CUtensorMap c = {};
};

}  // namespace anabranch::hopper
