#pragma once

// An operand of a tile on its way from memory into a stage: 128 lines by 64 elements of the sum, as two boxes.
#include "gemm/ampere/shape.cuh"
#include "gemm/tiles/ptx.cuh"

namespace anabranch::ampere {

/// Of one expert. `kTransposed`: the sum runs over the rows of memory, and lines are its columns. `kTwoParts`: the
/// upper 64 lines are those of a second matrix, which lies behind the first.
template <typename scalar_t, bool kTransposed, bool kTwoParts = false>
class Operand {
 public:
  /// Of a matrix whose rows in memory have `pitch` elements: the lines from `first` on, of `lines`. The sum has
  /// `depth` elements.
  __device__ Operand(const scalar_t* matrix, int pitch, int first, int lines, int depth)
      : matrix_(matrix), pitch_(pitch), depth_(depth) {
    const int line = first + own_line();
    source_ = matrix + static_cast<int64_t>(own_row()) * pitch;
    if constexpr (kTransposed) {
      source_ += line;
      inside_ = line < lines ? 1 : 0;
    } else {
      source_ += static_cast<int64_t>(first) * pitch + threadIdx.x % 8 * 8;
      second_ = static_cast<int64_t>(lines - kSide / 2) * pitch;
#pragma unroll
      for (int i = 0; i < kTurns; ++i) {
        const int turn = kTwoParts ? i % (kTurns / 2) : i;
        inside_ |= line + turn * kTurnRows < lines ? 1 << i : 0;
      }
    }
  }

  /// Step `step` of the sum into a stage, by all threads of the CTA; see commit_copies. What lies outside becomes
  /// zero.
  __device__ void copy(int step, uint32_t stage) const {
    const int depth = step * kDepth + (kTransposed ? own_row() : threadIdx.x % 8 * 8);
    const scalar_t* source = source_ + (kTransposed ? int64_t{kDepth} * pitch_ : kDepth) * step;
    const uint32_t target = stage + place(own_row(), threadIdx.x % 8) +
                            (kTransposed ? threadIdx.x % 16 / 8 * kBoxBytes : 0);
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      const bool inside = kTransposed ? inside_ != 0 && depth + i * kTurnRows < depth_
                                      : (inside_ >> i & 1) != 0 && depth < depth_;
      const scalar_t* from = source + static_cast<int64_t>(i) * kTurnRows * pitch_;
      if (kTwoParts && i >= kTurns / 2) from += second_;
      copy_16(target + i * kTurnRows * 128, inside ? from : matrix_, inside);
    }
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

  const scalar_t* matrix_;
  const scalar_t* source_;
  int pitch_;
  int depth_;
  int inside_ = 0;      // a bit for each turn's line
  int64_t second_ = 0;  // from where the upper lines would be to where the second matrix has them
};

}  // namespace anabranch::ampere
