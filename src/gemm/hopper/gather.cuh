#pragma once

// The operand whose rows are read by an index: the producer's threads copy them into a stage as TMA would have, boxes
// with the 128-byte swizzle. Eight threads copy the 128 bytes of a row of a box.
#include "gemm/hopper/ptx.cuh"
#include "gemm/hopper/shape.cuh"

namespace anabranch::hopper {

/// By all threads of the producer warpgroup.
template <typename scalar_t, typename shape>
class GatheredOperand {
 protected:
  static constexpr int kTurnRows = kWarpgroup / 8;
  static constexpr int kBoxes = shape::kGathered == Gathered::kA ? shape::kABoxes : shape::kBBoxes;

  __device__ GatheredOperand(const Problem& problem, const IndexedRows& from)
      : problem_(problem), from_(from) {}

  __device__ static int own_row() { return threadIdx.x / 8; }
  __device__ static int own_column() { return threadIdx.x % 8 * 8; }
  /// Where this thread's part of its first row is in a box at `target`.
  __device__ static uint32_t own_place(uint32_t target) {
    return target + (own_row() * 128 + ((threadIdx.x % 8 ^ own_row() % 8) << 4));
  }

  const Problem& problem_;
  const IndexedRows& from_;
};

/// Of forward and dgrad, whose rows are a tile's.
template <typename scalar_t, typename shape>
class GatheredTile : GatheredOperand<scalar_t, shape> {
  using Base = GatheredOperand<scalar_t, shape>;
  using Base::kBoxes;
  using Base::kTurnRows;

 public:
  __device__ GatheredTile(const Problem& problem, const IndexedRows& from) : Base(problem, from) {}

  __device__ void begin(const Tile& tile) {
    const int64_t* const first = this->from_.index + tile.group.first_row;
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      const int row = tile.row + this->own_row() + i * kTurnRows;
      rows_[i] = row < tile.group.rows ? static_cast<int>(first[row]) : -1;
    }
  }

  /// Block `block` of the sum to `target`. What lies outside becomes zero.
  __device__ void copy(int block, uint32_t target) {
    target = this->own_place(target);
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      copy_row(rows_[i], block * kBox + this->own_column(), this->problem_.k,
               target + i * kTurnRows * 128);
    }
  }

 private:
  static constexpr int kTurns = kBoxes * kBox / kTurnRows;

  __device__ void copy_row(int row, int column, int columns, uint32_t target) const {
    const bool inside = row >= 0 && column < columns;
    const auto* rows = static_cast<const scalar_t*>(this->from_.rows);
    copy_16(target, inside ? rows + static_cast<int64_t>(row) * this->from_.pitch + column : rows,
            inside);
  }

  int rows_[kTurns];
};

/// Of wgrad, whose rows are a block's.
///
/// What a warp does for a block must take less time than its products. So the index is not read there: loads come back in
/// their order, one of the index behind all copies before it. Each lane holds one of 128 rows, those of a pair of blocks
/// that its warp copies, found three blocks before.
template <typename scalar_t, typename shape>
class GatheredSum : GatheredOperand<scalar_t, shape> {
  using Base = GatheredOperand<scalar_t, shape>;
  using Base::kBoxes;
  using Base::kTurnRows;

 public:
  __device__ GatheredSum(const Problem& problem, const IndexedRows& from) : Base(problem, from) {}

  /// Of the tile that is begun next.
  __device__ void find_rows(const Tile& tile) {
    next_[0] = find(tile, 0);
    next_[1] = find(tile, kFound);
  }

  __device__ void begin() {
    found_[0] = next_[0];
    found_[1] = next_[1];
    spread(found_[0], 0);
  }

  /// Block `block` of the tile's sum to `target`. What lies outside becomes zero.
  __device__ void copy(const Tile& tile, int block, uint32_t target) {
    target = this->own_place(target);
    constexpr bool kA = shape::kGathered == Gathered::kA;
    const int column = this->own_column() + (kA ? tile.row : tile.column);
    const int columns = kA ? this->problem_.m : this->problem_.n;
    const auto* const begin = static_cast<const scalar_t*>(this->from_.rows) + column;
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      const auto* const row = begin + static_cast<int64_t>(rows_[i]) * this->from_.pitch;
#pragma unroll
      for (int box = 0; box < kBoxes; ++box) {
        copy_16(target + box * kBoxBytes + i * kTurnRows * 128, row + box * kBox,
                rows_[i] >= 0 && column + box * kBox < columns);
      }
    }
    prepare(tile, block + 1);
  }

 private:
  static constexpr int kFound = 32 / 4 * kTurnRows;  // rows of which a warp's lanes hold its own
  static constexpr int kTurns = kBox / kTurnRows;
  static_assert(2 * kBox == kFound);

  /// A row of those from the group's row `begin` on that this thread's warp copies, four a turn; −1 where there is none.
  __device__ int find(const Tile& tile, int begin) const {
    const int lane = threadIdx.x % 32;
    const int row = begin + lane / 4 * kTurnRows + threadIdx.x / 32 * 4 + lane % 4;
    return row < tile.group.rows ? static_cast<int>(this->from_.index[tile.group.first_row + row])
                                 : -1;
  }
  /// This thread's rows of those that the warp's lanes hold.
  __device__ void spread(int found, int first_turn) {
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      rows_[i] = __shfl_sync(~0U, found, (first_turn + i) * 4 + threadIdx.x % 32 / 8);
    }
  }
  /// Block `block`; where it begins a pair, the pair before has been copied.
  __device__ void prepare(const Tile& tile, int block) {
    const int turn = block % 2 * kTurns;
    if ((block & 2) == 0) {
      spread(found_[0], turn);
      if (turn == 0) found_[1] = find(tile, (block + 2) * kBox);
    } else {
      spread(found_[1], turn);
      if (turn == 0) found_[0] = find(tile, (block + 2) * kBox);
    }
  }

  int found_[2];
  int next_[2];
  int rows_[kTurns];
};

}  // namespace anabranch::hopper
