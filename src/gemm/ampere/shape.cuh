#pragma once

// How a tile is cut and laid out: what all parts of the kernel agree on at compile time.
#include "gemm/tiles/problem.h"
#include "gemm/tiles/task.h"
#include "gemm/tiles/tile_scheduler.cuh"

namespace anabranch::ampere {

using namespace tiles;

constexpr int kSide = 128;     // rows and columns of a CTA's products
constexpr int kThreads = 256;  // warps of 64 x 32 products, 2 above one another and 4 beside
constexpr int kWarpRows = 64;
constexpr int kWarpColumns = 32;
constexpr int kStages = 3;  // steps of the sum in shared memory
constexpr int kBoxBytes = 64 * 64 * 2;
constexpr int kOperandBytes = 2 * kBoxBytes;
constexpr int kStageBytes = 2 * kOperandBytes;
constexpr int kSharedBytes = kStages * kStageBytes + (kMostSlots + 1) * 4;

template <Operation kOperation_, Epilogue kEpilogue_ = Epilogue::kStore, bool kGlu_ = false>
struct Shape {
  static constexpr Operation kOperation = kOperation_;
  static constexpr Epilogue kEpilogue = kEpilogue_;
  static constexpr bool kGlu = kGlu_;
  static constexpr bool kTransposedA = kOperation == Operation::kWgrad;
  static constexpr bool kTransposedB = kOperation != Operation::kForward;
  static constexpr bool kRaggedK = kOperation == Operation::kWgrad;
  /// The left half of a tile is gate, the right half the up part of the same columns.
  static constexpr bool kGateAndUp = kGlu && kEpilogue == Epilogue::kActivate;
  // Of the tile scheduler.
  static constexpr Share kShare = Share::kNone;
  static constexpr int kClusterSize = 1;
  static constexpr int kRows = kSide;
  static constexpr int kTileColumns = kGateAndUp ? kSide / 2 : kSide;
};

/// Where 16 bytes lie in a box of 64 (of two: 128) lines of 128 bytes, in an order that keeps reads of eight
/// lines off each other's banks.
__device__ __forceinline__ uint32_t place(int line, int pack) {
  return line * 128 + ((pack ^ (line & 7)) << 4);
}

/// A warp's products: of 16 rows by 8 columns each, see multiply_add.
using Sums = float[kWarpRows / 16][kWarpColumns / 8][4];

/// The first row and column of this thread's warp in a tile.
__device__ __forceinline__ int warp_row() { return threadIdx.x / 32 % 2 * kWarpRows; }
__device__ __forceinline__ int warp_column() { return threadIdx.x / 64 * kWarpColumns; }

}  // namespace anabranch::ampere
