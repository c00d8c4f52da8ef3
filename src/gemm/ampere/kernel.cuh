#pragma once

// One persistent kernel for the three products of a grouped GEMM, c = a · b for every expert, on the tensor cores of
// any GPU since Ampere: tiles of 128 x 128, whose operands are copied two steps of the sum ahead.
#include "gemm/ampere/epilogue.cuh"
#include "gemm/ampere/mma.cuh"
#include "gemm/ampere/operand.cuh"

namespace anabranch::ampere {

/// a, b and, of kStore, c of all experts; of rows that are gathered the index.
template <typename scalar_t>
struct Matrices {
  const scalar_t* a;
  const scalar_t* b;
  scalar_t* c;
  const int64_t* index_a = nullptr;
  const int64_t* index_b = nullptr;
};

/// The rows of an expert, from `first_row` on.
template <typename scalar_t>
__device__ __forceinline__ Matrix<scalar_t> rows_from(const scalar_t* rows, const int64_t* index,
                                                      int first_row, int pitch) {
  return index != nullptr
             ? Matrix<scalar_t>{rows, index + first_row, pitch}
             : Matrix<scalar_t>{rows + static_cast<int64_t>(first_row) * pitch, nullptr, pitch};
}

/// sums += the products of a stage.
template <typename scalar_t, typename shape>
__device__ __forceinline__ void multiply(Sums& sums, uint32_t stage) {
  const int lane = threadIdx.x % 32;
  const int low = lane % 8 + lane / 8 % 2 * 8;  // of 16: matrices 0 and 2 the first half
  const int high = lane % 8 + lane / 16 * 8;    // of 16: matrices 0 and 1
  const auto address = [](uint32_t operand, bool transposed, int depth, int line) {
    return transposed ? operand + line / 64 * kBoxBytes + place(depth, line % 64 / 8)
                      : operand + place(line, depth / 8);
  };
#pragma unroll
  for (int depth = 0; depth < kDepth; depth += 16) {
    uint32_t a[kWarpRows / 16][4];
#pragma unroll
    for (int i = 0; i < kWarpRows / 16; ++i) {
      const int row = warp_row() + i * 16;
      load_matrices<shape::kTransposedA>(
          a[i], shape::kTransposedA ? address(stage, true, depth + high, row + lane / 8 % 2 * 8)
                                    : address(stage, false, depth + lane / 16 * 8, row + low));
    }
#pragma unroll
    for (int j = 0; j < kWarpColumns / 8; j += 2) {
      const int column = warp_column() + j * 8;
      const uint32_t operand = stage + kOperandBytes;
      uint32_t b[4];
      load_matrices<shape::kTransposedB>(
          b, shape::kTransposedB
                 ? address(operand, true, depth + low, column + lane / 16 * 8)
                 : address(operand, false, depth + lane / 8 % 2 * 8, column + high));
#pragma unroll
      for (int i = 0; i < kWarpRows / 16; ++i) {
        multiply_add(sums[i][j], a[i], b[0], b[1], scalar_t{});
        multiply_add(sums[i][j + 1], a[i], b[2], b[3], scalar_t{});
      }
    }
  }
}

/// The products of one tile.
template <typename scalar_t, typename shape>
__device__ __forceinline__ void multiply(const Problem& problem, const Matrices<scalar_t>& matrices,
                                         const Tile& tile, uint32_t stages, Sums& sums) {
  const Group& group = tile.group;
  const int depth = shape::kRaggedK ? group.rows : problem.k;
  const int pitch_a = shape::kRaggedK ? problem.m : problem.k;
  const int pitch_b = shape::kOperation == Operation::kForward ? problem.k : problem.n;
  const int64_t weight = static_cast<int64_t>(shape::kGateAndUp ? 2 : 1) * problem.n * problem.k;
  Operand<scalar_t, shape::kTransposedA> a(
      rows_from(matrices.a, matrices.index_a, group.first_row, pitch_a), tile.row,
      shape::kRaggedK ? problem.m : group.rows, depth);
  Operand<scalar_t, shape::kTransposedB, shape::kGateAndUp> b(
      shape::kRaggedK ? rows_from(matrices.b, matrices.index_b, group.first_row, pitch_b)
                      : Matrix<scalar_t>{matrices.b + group.expert * weight, nullptr, pitch_b},
      tile.column, problem.n, depth);
  const auto copy = [&](int step, int stage) {
    if (step < tile.k_blocks) {
      a.copy(step, stages + stage * kStageBytes);
      b.copy(step, stages + stage * kStageBytes + kOperandBytes);
    }
    commit_copies();
  };
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) {
    copy(step, step);
  }
  int stage = 0;
#pragma unroll 1
  for (int step = 0; step < tile.k_blocks; ++step) {
    wait_copies<kStages - 2>();
    __syncthreads();  // all have what this step takes, and are done with what comes into the free stage
    copy(step + kStages - 1, stage == 0 ? kStages - 1 : stage - 1);
    multiply<scalar_t, shape>(sums, stages + stage * kStageBytes);
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
  wait_copies<0>();
  __syncthreads();
}

template <typename scalar_t, typename shape>
__global__ void __launch_bounds__(kThreads, 2)
    grouped_gemm_kernel(const __grid_constant__ Problem problem,
                        const __grid_constant__ Matrices<scalar_t> matrices) {
  extern __shared__ __align__(128) uint8_t memory[];
  const uint32_t stages = shared_address(memory);
  int* const first_unit = reinterpret_cast<int*>(memory + kStages * kStageBytes);
  if (threadIdx.x < 32) count_units<shape>(problem, first_unit);
  __syncthreads();
  TileScheduler<shape> tiles(problem, first_unit, /*rank=*/0);
  Tile tile;
  while (tiles.next(tile)) {
    Sums sums = {};
    multiply<scalar_t, shape>(problem, matrices, tile, stages, sums);
    if constexpr (shape::kEpilogue == Epilogue::kStore) {
      store<scalar_t, shape>(problem, tile, sums, stages, matrices.c);
    } else if constexpr (shape::kEpilogue == Epilogue::kAccumulate) {
      accumulate(problem, tile, sums);
    } else if constexpr (shape::kEpilogue == Epilogue::kActivate) {
      activate<scalar_t, shape>(problem, tile, sums, stages);
    } else {
      differentiate<scalar_t, shape>(problem, tile, sums, stages);
    }
    __syncthreads();  // nobody reads any more what the next tile's copies write over
  }
}

}  // namespace anabranch::ampere
