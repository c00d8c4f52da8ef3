#include <algorithm>

#include "baselines/block_sparse/launch.h"
#include "kernels/cuda/device.cuh"

namespace anabranch::block_sparse {
namespace {

using cuda::kFullMask;
using cuda::kWarp;

constexpr int kThreads = 256;

/// first [2, experts + 1]: the first block row of each expert, and its first token. By one warp.
__global__ void first_rows_kernel(const int64_t* __restrict__ counts, int64_t experts,
                                  int64_t block, int64_t* __restrict__ first) {
  int64_t rows_before = 0;
  int64_t tokens_before = 0;
  for (int64_t base = 0; base <= experts; base += kWarp) {
    const int64_t e = base + threadIdx.x;
    const int64_t count = e < experts ? counts[e] : 0;
    const int64_t own_rows = (count + block - 1) / block;
    int64_t rows = own_rows;
    int64_t tokens = count;
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const int64_t other_rows = __shfl_up_sync(kFullMask, rows, distance);
      const int64_t other_tokens = __shfl_up_sync(kFullMask, tokens, distance);
      if (threadIdx.x >= distance) {
        rows += other_rows;
        tokens += other_tokens;
      }
    }
    if (e <= experts) {
      first[e] = rows_before + rows - own_rows;
      first[experts + 1 + e] = tokens_before + tokens - count;
    }
    rows_before += __shfl_sync(kFullMask, rows, kWarp - 1);
    tokens_before += __shfl_sync(kFullMask, tokens, kWarp - 1);
  }
}

/// Thread i writes what belongs to block row i, to block column i and to block i.
__global__ void __launch_bounds__(kThreads)
    topology_kernel(const __grid_constant__ Layout layout, const int64_t* __restrict__ first_row,
                    const int64_t* __restrict__ first_token) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t columns = layout.expert_columns;
  if (i < layout.block_rows) {
    const int64_t e = cuda::upper_bound(first_row + 1, layout.experts, i);
    const int64_t token = first_token[e] + (i - first_row[e]) * layout.block;
    layout.first_token[i] = token;
    layout.block_tokens[i] = static_cast<int32_t>(min(layout.block, first_token[e + 1] - token));
  }
  if (i <= layout.block_rows) {
    layout.row_offsets[i] = static_cast<int32_t>(i * columns);
  }
  if (i < layout.experts * columns) {
    const int64_t e = i / columns;
    const int64_t rows = first_row[e + 1] - first_row[e];
    layout.column_offsets[i] = static_cast<int32_t>(first_row[e] * columns + i % columns * rows);
  } else if (i == layout.experts * columns) {
    layout.column_offsets[i] = static_cast<int32_t>(layout.block_rows * columns);
  }
  if (i < layout.block_rows * columns) {
    const int64_t row = i / columns;
    const int64_t column = i % columns;
    const int64_t e = cuda::upper_bound(first_row + 1, layout.experts, row);
    const int64_t rows = first_row[e + 1] - first_row[e];
    layout.row_indices[i] = static_cast<int32_t>(row);
    layout.column_indices[i] = static_cast<int32_t>(e * columns + column);
    const int64_t transposed = first_row[e] * columns + column * rows + row - first_row[e];
    layout.transposed_rows[transposed] = static_cast<int32_t>(row);
    layout.transposed_order[transposed] = static_cast<int32_t>(i);
  }
}

}  // namespace

void launch_topology(const Layout& layout, const int64_t* counts, int64_t* first,
                     cudaStream_t stream) {
  first_rows_kernel<<<1, kWarp, 0, stream>>>(counts, layout.experts, layout.block, first);
  check_launch("first_rows");
  const int64_t columns = layout.experts * layout.expert_columns;
  const int64_t threads =
      std::max({layout.block_rows * layout.expert_columns, columns, layout.block_rows}) + 1;
  topology_kernel<<<cuda::grid_size(cuda::divide_up(threads, kThreads)), kThreads, 0, stream>>>(
      layout, first, first + layout.experts + 1);
  check_launch("topology");
}

}  // namespace anabranch::block_sparse
