// The products on any GPU, for every type and block: one block of the result for each CTA. 16-bit
// types on the tensor cores; fp32 and fp64 exactly, by ordinary arithmetic.
#include <mma.h>

#include "gemm/block_sparse/launch.h"
#include "kernels/cuda/device.cuh"

namespace anabranch::block_sparse {
namespace {

using cuda::accumulate_t;
using cuda::kWarp;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

/// A matrix of which a tile is read or written; outside of [rows, columns] it is zero.
template <typename scalar_t>
struct Panel {
  scalar_t* data;
  int64_t row_step;
  int64_t column_step;
  int64_t rows;
  int64_t columns;

  __device__ Panel transposed() const { return {data, column_step, row_step, columns, rows}; }
  __device__ bool inside(int64_t row, int64_t column) const {
    return row < rows && column < columns;
  }
  __device__ scalar_t& at(int64_t row, int64_t column) const {
    return data[row * row_step + column * column_step];
  }
};

/// Where the blocks of the operands lie.
template <typename scalar_t>
class Blocks {
 public:
  using Part = Panel<scalar_t>;

  __device__ explicit Blocks(const Arguments& arguments)
      : arguments_(arguments), layout_(arguments.layout) {}

  __device__ Part values(int64_t block) const {
    const int64_t row = layout_.row_indices[block];
    const int64_t start = (block - layout_.row_offsets[row]) * layout_.block;
    return {static_cast<scalar_t*>(arguments_.values) + layout_.first_token[row] * layout_.width +
                start,
            layout_.width, 1, layout_.block_tokens[row], min(layout_.block, layout_.width - start)};
  }
  /// Columns from `start` of a block row's tokens.
  __device__ Part dense(int64_t row, int64_t start) const {
    return {
        static_cast<scalar_t*>(arguments_.dense) + layout_.first_token[row] * arguments_.k + start,
        arguments_.k, 1, layout_.block_tokens[row], arguments_.k - start};
  }
  /// [columns of the block column, k from `start`].
  __device__ Part weight(int64_t column, int64_t start) const {
    const int64_t expert = column / layout_.expert_columns;
    const int64_t first = column % layout_.expert_columns * layout_.block;
    const int64_t row_step = arguments_.width_last ? 1 : arguments_.k;
    const int64_t column_step = arguments_.width_last ? layout_.width : 1;
    return {static_cast<scalar_t*>(arguments_.weight) + expert * layout_.width * arguments_.k +
                first * row_step + start * column_step,
            row_step, column_step, min(layout_.block, layout_.width - first), arguments_.k - start};
  }

 private:
  const Arguments& arguments_;
  const Layout& layout_;
};

/// A tile of kRows x kColumns elements, rows of kPitch, copied from (row, column) of a panel; whichever
/// index runs along memory runs along the threads.
template <int kRows, int kColumns, int kPitch, typename tile_t, typename scalar_t>
__device__ void copy_tile(const Panel<scalar_t>& panel, int64_t row, int64_t column, tile_t* tile) {
  for (int i = threadIdx.x; i < kRows * kColumns; i += kThreads) {
    const bool along_rows = panel.column_step == 1;
    const int r = along_rows ? i / kColumns : i % kRows;
    const int c = along_rows ? i % kColumns : i / kRows;
    tile[r * kPitch + c] = panel.inside(row + r, column + c)
                               ? static_cast<tile_t>(panel.at(row + r, column + c))
                               : static_cast<tile_t>(0.0f);
  }
}

/// The sums of a tile of kBlock x kBlock, with ordinary arithmetic: each thread has every 16th row
/// and column.
template <typename scalar_t, int kBlock>
class Sums {
 public:
  using sum_t = accumulate_t<scalar_t>;

  /// += a · b, as far as a has columns.
  __device__ void add(const Panel<scalar_t>& a, const Panel<scalar_t>& b) {
    __shared__ sum_t tile_a[kBlock * kPitchA];
    __shared__ sum_t tile_b[kDepth * kPitchB];
    for (int64_t start = 0; start < a.columns; start += kDepth) {
      __syncthreads();
      copy_tile<kBlock, kDepth, kPitchA>(a, 0, start, tile_a);
      copy_tile<kDepth, kBlock, kPitchB>(b, start, 0, tile_b);
      __syncthreads();
#pragma unroll 4
      for (int depth = 0; depth < kDepth; ++depth) {
        sum_t column[kOwn];
#pragma unroll
        for (int j = 0; j < kOwn; ++j) {
          column[j] = tile_b[depth * kPitchB + threadIdx.x % 16 + 16 * j];
        }
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          const sum_t row = tile_a[(threadIdx.x / 16 + 16 * i) * kPitchA + depth];
#pragma unroll
          for (int j = 0; j < kOwn; ++j) {
            sums_[i][j] += row * column[j];
          }
        }
      }
    }
  }

  __device__ void store(const Panel<scalar_t>& c) const {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
#pragma unroll
      for (int j = 0; j < kOwn; ++j) {
        const int row = threadIdx.x / 16 + 16 * i;
        const int column = threadIdx.x % 16 + 16 * j;
        if (c.inside(row, column)) {
          c.at(row, column) = static_cast<scalar_t>(sums_[i][j]);
        }
      }
    }
  }

 private:
  static_assert(kThreads == 16 * 16);
  static constexpr int kOwn = kBlock / 16;
  static constexpr int kDepth = 16;
  static constexpr int kPitchA = kDepth + 1;
  static constexpr int kPitchB = kBlock + 1;

  sum_t sums_[kOwn][kOwn] = {};
};

/// The same on the tensor cores: each warp has some of the tile's pieces of 16 x 16.
template <typename scalar_t, int kBlock>
class TensorSums {
 public:
  __device__ TensorSums() {
#pragma unroll
    for (auto& sum : sums_) {
      nvcuda::wmma::fill_fragment(sum, 0.0f);
    }
  }

  __device__ void add(const Panel<scalar_t>& a, const Panel<scalar_t>& b) {
    namespace wmma = nvcuda::wmma;
    __shared__ alignas(32) scalar_t tile_a[kBlock * kPitchA];
    __shared__ alignas(32) scalar_t tile_b[kDepth * kPitchB];
    for (int64_t start = 0; start < a.columns; start += kDepth) {
      __syncthreads();
      copy_tile<kBlock, kDepth, kPitchA>(a, 0, start, tile_a);
      copy_tile<kDepth, kBlock, kPitchB>(b, start, 0, tile_b);
      __syncthreads();
      if (first_piece() >= kPieces) continue;
#pragma unroll
      for (int depth = 0; depth < kDepth; depth += 16) {
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          wmma::fragment<wmma::matrix_a, 16, 16, 16, scalar_t, wmma::row_major> left;
          wmma::fragment<wmma::matrix_b, 16, 16, 16, scalar_t, wmma::row_major> right;
          wmma::load_matrix_sync(left, tile_a + piece_row(i) * kPitchA + depth, kPitchA);
          wmma::load_matrix_sync(right, tile_b + depth * kPitchB + piece_column(i), kPitchB);
          wmma::mma_sync(sums_[i], left, right, sums_[i]);
        }
      }
    }
  }

  __device__ void store(const Panel<scalar_t>& c) const {
    __shared__ alignas(32) float staging[kWarps][16 * 16];
    float* const piece = staging[threadIdx.x / kWarp];
    if (first_piece() >= kPieces) return;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      __syncwarp();
      nvcuda::wmma::store_matrix_sync(piece, sums_[i], 16, nvcuda::wmma::mem_row_major);
      __syncwarp();
      for (int element = threadIdx.x % kWarp; element < 16 * 16; element += kWarp) {
        const int row = piece_row(i) + element / 16;
        const int column = piece_column(i) + element % 16;
        if (c.inside(row, column)) {
          c.at(row, column) = static_cast<scalar_t>(piece[element]);
        }
      }
    }
  }

 private:
  static constexpr int kSide = kBlock / 16;
  static constexpr int kPieces = kSide * kSide;
  static constexpr int kOwn = kPieces < kWarps ? 1 : kPieces / kWarps;
  static constexpr int kDepth = 32;
  static constexpr int kPitchA = kDepth + 8;
  static constexpr int kPitchB = kBlock + 8;

  __device__ static int first_piece() { return threadIdx.x / kWarp * kOwn; }
  __device__ static int piece_row(int i) { return (first_piece() + i) / kSide * 16; }
  __device__ static int piece_column(int i) { return (first_piece() + i) % kSide * 16; }

  nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, 16, float> sums_[kOwn];
};

template <typename scalar_t, int kBlock>
using SumsOf =
    std::conditional_t<sizeof(scalar_t) == 2, TensorSums<scalar_t, kBlock>, Sums<scalar_t, kBlock>>;

/// CTA i: block i of S.
template <typename scalar_t, int kBlock>
__global__ void __launch_bounds__(kThreads)
    sdd_kernel(const __grid_constant__ Arguments arguments) {
  const Blocks<scalar_t> blocks(arguments);
  const int64_t i = blockIdx.x;
  SumsOf<scalar_t, kBlock> sums;
  sums.add(blocks.dense(arguments.layout.row_indices[i], 0),
           blocks.weight(arguments.layout.column_indices[i], 0).transposed());
  sums.store(blocks.values(i));
}

/// CTA: a block row's next kBlock of k columns.
template <typename scalar_t, int kBlock>
__global__ void __launch_bounds__(kThreads)
    dsd_kernel(const __grid_constant__ Arguments arguments) {
  const Blocks<scalar_t> blocks(arguments);
  const Layout& layout = arguments.layout;
  const int64_t tiles = (arguments.k + kBlock - 1) / kBlock;
  const int64_t row = blockIdx.x / tiles;
  const int64_t start = blockIdx.x % tiles * kBlock;
  SumsOf<scalar_t, kBlock> sums;
  for (int64_t i = layout.row_offsets[row]; i < layout.row_offsets[row + 1]; ++i) {
    sums.add(blocks.values(i), blocks.weight(layout.column_indices[i], start));
  }
  sums.store(blocks.dense(row, start));
}

/// CTA: a block column's next kBlock of k.
template <typename scalar_t, int kBlock>
__global__ void __launch_bounds__(kThreads)
    dds_kernel(const __grid_constant__ Arguments arguments) {
  const Blocks<scalar_t> blocks(arguments);
  const Layout& layout = arguments.layout;
  const int64_t tiles = (arguments.k + kBlock - 1) / kBlock;
  const int64_t column = blockIdx.x / tiles;
  const int64_t start = blockIdx.x % tiles * kBlock;
  SumsOf<scalar_t, kBlock> sums;
  for (int64_t i = layout.column_offsets[column]; i < layout.column_offsets[column + 1]; ++i) {
    sums.add(blocks.values(layout.transposed_order[i]).transposed(),
             blocks.dense(layout.transposed_rows[i], start));
  }
  sums.store(blocks.weight(column, start));
}

/// Calls `body` with the C++ type and the block as compile-time constants.
template <typename Body>
void dispatch(cuda::Scalar scalar, int64_t block, const Body& body) {
  cuda::dispatch(scalar, [&](auto element) {
    switch (block) {
      case 128:
        return body(element, std::integral_constant<int, 128>{});
      case 64:
        return body(element, std::integral_constant<int, 64>{});
      default:
        return body(element, std::integral_constant<int, 32>{});
    }
  });
}

}  // namespace

void launch_sdd(cuda::Scalar scalar, const Arguments& arguments, cudaStream_t stream) {
  const Layout& layout = arguments.layout;
  const unsigned grid = cuda::grid_size(layout.block_rows * layout.expert_columns);
  if (grid == 0) return;
  dispatch(scalar, layout.block, [&](auto element, auto block) {
    sdd_kernel<decltype(element), block><<<grid, kThreads, 0, stream>>>(arguments);
  });
  check_launch("sdd");
}

void launch_dsd(cuda::Scalar scalar, const Arguments& arguments, cudaStream_t stream) {
  const Layout& layout = arguments.layout;
  const unsigned grid =
      cuda::grid_size(layout.block_rows * cuda::divide_up(arguments.k, layout.block));
  if (grid == 0) return;
  dispatch(scalar, layout.block, [&](auto element, auto block) {
    dsd_kernel<decltype(element), block><<<grid, kThreads, 0, stream>>>(arguments);
  });
  check_launch("dsd");
}

void launch_dds(cuda::Scalar scalar, const Arguments& arguments, cudaStream_t stream) {
  const Layout& layout = arguments.layout;
  const unsigned grid = cuda::grid_size(layout.experts * layout.expert_columns *
                                        cuda::divide_up(arguments.k, layout.block));
  if (grid == 0) return;
  dispatch(scalar, layout.block, [&](auto element, auto block) {
    dds_kernel<decltype(element), block><<<grid, kThreads, 0, stream>>>(arguments);
  });
  check_launch("dds");
}

}  // namespace anabranch::block_sparse
