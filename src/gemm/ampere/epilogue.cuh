#pragma once

// What becomes of a tile's products. Through shared memory, where the stages were, they become rows: eight threads
// hold 64 neighbouring elements and write whole lines of memory.
#include "gemm/ampere/shape.cuh"
#include "gemm/tiles/activation.cuh"
#include "gemm/tiles/ptx.cuh"

namespace anabranch::ampere {

/// The products of a tile, rounded, in shared memory: a box of 128 rows by 64 columns for each half.
template <typename scalar_t>
class Rounded {
 public:
  /// By all threads of the CTA, which then may read them.
  __device__ Rounded(const Sums& sums, uint32_t memory) : memory_(memory) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kWarpRows / 16; ++i) {
#pragma unroll
      for (int j = 0; j < kWarpColumns / 8; ++j) {
        const int column = warp_column() + j * 8;
        const uint32_t box = memory_ + column / 64 * kHalfBytes;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = warp_row() + i * 16 + half * 8 + lane / 4;
          const uint32_t word =
              cuda::pack_word(sums[i][j][2 * half], sums[i][j][2 * half + 1], scalar_t{});
          store_word(box + place(row, column % 64 / 8) + lane % 4 * 4, word);
        }
      }
    }
    __syncthreads();
  }
  /// This thread's eight elements of a row of a half.
  __device__ Eight<scalar_t> read(int half, int row) const {
    Eight<scalar_t> eight;
    load_words(memory_ + half * kHalfBytes + place(row, threadIdx.x % 8), eight.words);
    return eight;
  }

 private:
  static constexpr int kHalfBytes = kSide * 128;

  uint32_t memory_;
};

/// Calls `body(half, row, column)` with the row of a half of a tile, and the column there, of each eight elements that
/// are this thread's: the same on all threads, but for where.
template <int kHalves, typename Body>
__device__ __forceinline__ void for_own_eights(const Body& body) {
#pragma unroll 1
  for (int row = threadIdx.x / 8; row < kSide; row += kThreads / 8) {
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      body(half, row, half * 64 + threadIdx.x % 8 * 8);
    }
  }
}

template <typename scalar_t>
__device__ __forceinline__ Eight<scalar_t>& eight_at(void* rows, int64_t element) {
  return *reinterpret_cast<Eight<scalar_t>*>(static_cast<scalar_t*>(rows) + element);
}

template <typename scalar_t, typename shape>
__device__ void store(const Problem& problem, const Tile& tile, const Sums& sums, uint32_t memory,
                      scalar_t* c) {
  const Rounded<scalar_t> rounded(sums, memory);
  const int rows = shape::kRaggedK ? problem.m : tile.group.rows;
  const int64_t first_row =
      shape::kRaggedK ? static_cast<int64_t>(tile.group.expert) * problem.m : tile.group.first_row;
  for_own_eights<2>([&](int half, int row, int column) {
    const int n = tile.column + column;
    if (tile.row + row < rows && n < problem.n) {
      eight_at<scalar_t>(c, (first_row + tile.row + row) * problem.n + n) = rounded.read(half, row);
    }
  });
}

/// Adds the products to fp32 sums in memory: [experts, m, n].
__device__ inline void accumulate(const Problem& problem, const Tile& tile, const Sums& sums) {
  if (tile.k_blocks == 0) return;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kWarpRows / 16; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = tile.row + warp_row() + i * 16 + half * 8 + lane / 4;
      if (row >= problem.m) continue;
      float* const target =
          problem.sum + (static_cast<int64_t>(tile.group.expert) * problem.m + row) * problem.n;
#pragma unroll
      for (int j = 0; j < kWarpColumns / 8; ++j) {
        const int column = tile.column + warp_column() + j * 8 + lane % 4 * 2;
        if (column >= problem.n) continue;
        auto& pair = *reinterpret_cast<float2*>(target + column);
        pair = {pair.x + sums[i][j][2 * half], pair.y + sums[i][j][2 * half + 1]};
      }
    }
  }
}

/// Stores the hidden rows and their activation, which is taken of the rounded values: the same bits as in two
/// steps.
template <typename scalar_t, typename shape>
__device__ void activate(const Problem& problem, const Tile& tile, const Sums& sums,
                         uint32_t memory) {
  const Rounded<scalar_t> rounded(sums, memory);
  const int64_t n = problem.n;
  with_activation(problem.activation, [&](auto kind) {
    for_own_eights<shape::kGlu ? 1 : 2>([&](int half, int row, int column) {
      column += tile.column;
      if (tile.row + row >= tile.group.rows || column >= n) return;
      const int64_t global_row = tile.group.first_row + tile.row + row;
      const int64_t at = global_row * (shape::kGlu ? 2 : 1) * n + column;
      const Eight<scalar_t> gate = rounded.read(half, row);
      eight_at<scalar_t>(problem.hidden_out, at) = gate;
      float x[8];
      float up[8] = {};
      gate.unpack(x);
      if constexpr (shape::kGlu) {
        const Eight<scalar_t> packed = rounded.read(1, row);
        eight_at<scalar_t>(problem.hidden_out, at + n) = packed;
        packed.unpack(up);
      }
      activate_eight<decltype(kind)::value, shape::kGlu>(x, up);
      eight_at<scalar_t>(problem.activated, global_row * n + column) = Eight<scalar_t>::pack(x);
    });
  });
}

/// Backward of the activation: reads the hidden values, writes their gradient and the activation, both scaled by the
/// routing weights, and ⟨products, activation⟩ of each row's 64 elements.
template <typename scalar_t, typename shape>
__device__ void differentiate(const Problem& problem, const Tile& tile, const Sums& sums,
                              uint32_t memory) {
  const Rounded<scalar_t> rounded(sums, memory);
  const int64_t n = problem.n;
  void* const hidden_values = const_cast<void*>(problem.hidden);
  with_activation(problem.activation, [&](auto kind) {
    for_own_eights<2>([&](int half, int row, int column) {
      column += tile.column;
      const bool inside = tile.row + row < tile.group.rows && column < n;
      const int64_t global_row = tile.group.first_row + tile.row + row;
      const int64_t at = global_row * (shape::kGlu ? 2 : 1) * n + column;
      float gate[8] = {};
      float up[8] = {};
      float products[8];
      rounded.read(half, row).unpack(products);
      float weight = 1;
      if (inside) {
        eight_at<scalar_t>(hidden_values, at).unpack(gate);
        if constexpr (shape::kGlu) eight_at<scalar_t>(hidden_values, at + n).unpack(up);
        if (problem.weights != nullptr) weight = problem.weights[global_row];
      }
      float dot =
          differentiate_eight<decltype(kind)::value, shape::kGlu>(gate, up, products, weight);
#pragma unroll
      for (int distance = 1; distance < 8; distance *= 2) {
        dot += __shfl_xor_sync(0xFFFFFFFF, dot, distance);
      }
      if (!inside) return;
      eight_at<scalar_t>(problem.hidden_out, at) = Eight<scalar_t>::pack(gate);
      if constexpr (shape::kGlu) {
        eight_at<scalar_t>(problem.hidden_out, at + n) = Eight<scalar_t>::pack(up);
      }
      eight_at<scalar_t>(problem.activated, global_row * n + column) =
          Eight<scalar_t>::pack(products);
      if (threadIdx.x % 8 == 0) {
        const int64_t width = (n + kDotColumns - 1) / kDotColumns;
        problem.dots[global_row * width + column / kDotColumns] = dot;
      }
    });
  });
}

}  // namespace anabranch::ampere
