#pragma once

#include <cstdint>

#include "kernels/cuda/launch.h"

namespace anabranch::tiles {

/// An expert and its rows.
struct Group {
  int32_t expert;
  int32_t first_row;
  int32_t rows;
};

/// A tile of c of an expert, by its first row and column there.
struct Tile {
  Group group;
  int row;
  int column;
  int k_blocks;
};

/// Columns whose ⟨gradient, activation⟩ are one of Problem::dots.
constexpr int kDotColumns = 64;

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
  float* dots;  // and [P, ⌈n / kDotColumns⌉]: ⟨gradient, activation⟩ of so many columns each
};

}  // namespace anabranch::tiles
