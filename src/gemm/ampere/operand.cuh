#pragma once

// An operand of a tile on its way from memory into a stage: 128 lines by 64 elements of the sum, as two boxes.
#include "gemm/ampere/shape.cuh"
#include "gemm/tiles/ptx.cuh"

namespace anabranch::ampere {

/// A matrix in memory, whose rows have `pitch` elements; row r is number index[r] where there is an index.
template <typename scalar_t>
struct Matrix {
  const scalar_t* data;
  const int64_t* index;
  int pitch;
};

/// Of one expert. `kTransposed`: the sum runs over the rows of memory, and lines are its columns. `kTwoParts`: the
/// upper 64 lines are those of a second matrix, which lies behind the first.
template <typename scalar_t, bool kTransposed, bool kTwoParts = false>
class Operand {
 public:
  /// The lines from `first` on, of `lines`; the sum has `depth` elements.
  __device__ Operand(const Matrix<scalar_t>& matrix, int first, int lines, int depth)
      : matrix_(matrix), depth_(depth) {
    const int line = first + own_line();
    if constexpr (kTransposed) {
      column_ = line < lines ? line : -1;
      find_rows(0);
    } else {
#pragma unroll
      for (int i = 0; i < kTurns; ++i) {
        const int row = line + (kTwoParts ? i % (kTurns / 2) : i) * kTurnRows;
        rows_[i] = row < lines ? number(row) + (kTwoParts && i >= kTurns / 2 ? lines : 0) : -1;
      }
    }
  }

  /// Step `step` of the sum into a stage, by all threads of the CTA; see commit_copies. What lies outside becomes
  /// zero. Steps come in their order.
  __device__ void copy(int step, uint32_t stage) {
    const uint32_t target = stage + place(own_row(), threadIdx.x % 8) +
                            (kTransposed ? threadIdx.x % 16 / 8 * kBoxBytes : 0);
    int column = column_;
    if constexpr (!kTransposed) {
      column = step * kDepth + threadIdx.x % 8 * 8;
      column = column < depth_ ? column : -1;
    }
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      const bool inside = rows_[i] >= 0 && column >= 0;
      copy_16(target + i * kTurnRows * 128,
              inside ? matrix_.data + static_cast<int64_t>(rows_[i]) * matrix_.pitch + column
                     : matrix_.data,
              inside);
    }
    if constexpr (kTransposed) find_rows((step + 1) * kDepth);
  }

 private:
  static constexpr int kTurns = 4;  // 16 bytes of each thread
  static constexpr int kPacksOfRow = kTransposed ? kSide / 8 : kDepth / 8;
  static constexpr int kTurnRows = kThreads / kPacksOfRow;
  static_assert(kTurns * kTurnRows == (kTransposed ? kDepth : kSide) && kTurnRows % 8 == 0);
  static_assert(!(kTransposed && kTwoParts));

  /// This thread's first row of what is copied, and its line.
  __device__ static int own_row() { return threadIdx.x / kPacksOfRow; }
  __device__ static int own_line() { return kTransposed ? threadIdx.x % 16 * 8 : own_row(); }

  __device__ int number(int row) const {
    return matrix_.index != nullptr ? static_cast<int>(matrix_.index[row]) : row;
  }
  /// Of a step of the sum that begins at row `begin`.
  __device__ void find_rows(int begin) {
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      const int row = begin + own_row() + i * kTurnRows;
      rows_[i] = row < depth_ ? number(row) : -1;
    }
  }

  Matrix<scalar_t> matrix_;
  int depth_;
  int column_ = 0;    // transposed: of this thread's elements
  int rows_[kTurns];  // in memory; −1: outside
};

}  // namespace anabranch::ampere
