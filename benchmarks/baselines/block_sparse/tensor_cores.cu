// The products of 16-bit types on the tensor cores of any GPU since Ampere, for every block: a tile of
// one block by 128 elements for each CTA, its operands fetched two steps ahead.
#include "baselines/block_sparse/blocks.cuh"
#include "baselines/block_sparse/launch.h"
#include "gemm/ampere/mma.cuh"
#include "gemm/tiles/ptx.cuh"
#include "kernels/cuda/device.cuh"

namespace anabranch::block_sparse {
namespace {

using cuda::kWarp;

constexpr int kWide = 128;  // the other side of a tile
constexpr int kDepth = 64;  // elements of the sum in a step
constexpr int kStages = 3;  // steps in shared memory
constexpr int kPack = 8;    // elements of 16 bytes
constexpr int kWarpRows = 32;

template <typename scalar_t_, int kBlock_, Product kProduct_, bool kWidthLast_>
struct Shape {
  using scalar_t = scalar_t_;
  static constexpr int kBlock = kBlock_;
  static constexpr Product kProduct = kProduct_;
  static constexpr bool kWidthLast = kWidthLast_;

  /// A warp multiplies 32 of the block's rows by some of the columns.
  static constexpr int kRowWarps = kBlock / kWarpRows;
  static constexpr int kColumnWarps = kBlock == 32 ? 4 : 2;
  static constexpr int kThreads = kRowWarps * kColumnWarps * kWarp;
  static constexpr int kWarpColumns = kWide / kColumnWarps;

  /// How the operands lie in a stage: A [block, depth] and B [depth, wide], or transposed.
  static constexpr bool kTransposedA = kProduct == Product::kDds;
  static constexpr bool kTransposedB =
      kProduct != Product::kDds && (kProduct == Product::kSdd) != kWidthLast;
  static constexpr int kAColumns = kTransposedA ? kBlock : kDepth;
  static constexpr int kBColumns = kTransposedB ? kDepth : kWide;
  static constexpr int kABytes = kBlock * kDepth * 2;
  static constexpr int kStageBytes = kABytes + kWide * kDepth * 2;
  static constexpr int kSharedBytes = kStages * kStageBytes;
};

// --- shared memory: tiles of 16-byte packs, in an order that keeps reads of 8 rows off each other's
// banks ---

template <int kColumns>
__device__ __forceinline__ uint32_t pack_offset(int row, int pack) {
  constexpr int kPacks = kColumns / kPack;
  const int mixed = kPacks >= 8 ? pack ^ (row & 7) : pack ^ ((row >> 1) & 3);
  return (row * kPacks + mixed) * 16;
}

__device__ __forceinline__ void store_shared(uint32_t target, const uint32_t (&words)[4]) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(target), "r"(words[0]),
               "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

/// Fetches the operands of a tile, step by step. Memory is read in packs where all rows begin at
/// multiples of 16 bytes (`packed`), else element by element.
template <typename shape>
class Fetch {
 public:
  using scalar_t = typename shape::scalar_t;
  using Part = Panel<scalar_t>;

  __device__ Fetch(const Arguments& arguments, const TilePlace& place, bool packed)
      : blocks_(arguments), layout_(arguments.layout), place_(place), packed_(packed) {
    if constexpr (shape::kProduct == Product::kDds) {
      first_ = layout_.column_offsets[place.line];
      end_ = layout_.column_offsets[place.line + 1];
    } else {
      first_ = layout_.row_offsets[place.line];
      end_ = layout_.row_offsets[place.line + 1];
    }
    steps_ = ((end_ - first_) * shape::kBlock + kDepth - 1) / kDepth;
    if constexpr (shape::kProduct == Product::kSdd) {
      steps_ = static_cast<int>((arguments.k + kDepth - 1) / kDepth);
      a_ = blocks_.dense(place.line, 0);
#pragma unroll
      for (int i = 0; i < kBlocksWide; ++i) {
        b_[i] = weight(first_ + place.across * kBlocksWide + i, 0);
      }
    } else if constexpr (shape::kProduct == Product::kDsd) {
      a_ = blocks_.values_of_row(place.line, 0);
    }
  }

  __device__ int steps() const { return steps_; }

  __device__ void operator()(int step, uint32_t stage) const {
    const uint32_t tile_b = stage + shape::kABytes;
    if constexpr (shape::kProduct == Product::kSdd) {
      copy<shape::kBlock, kDepth, shape::kAColumns>(a_, 0, step * kDepth, stage, 0, 0);
#pragma unroll
      for (int i = 0; i < kBlocksWide; ++i) {
        if constexpr (shape::kTransposedB) {
          copy<shape::kBlock, kDepth, kDepth>(b_[i], 0, step * kDepth, tile_b, i * shape::kBlock,
                                              0);
        } else {
          copy<kDepth, shape::kBlock, kWide>(b_[i].transposed(), step * kDepth, 0, tile_b, 0,
                                             i * shape::kBlock);
        }
      }
    } else if constexpr (shape::kProduct == Product::kDsd) {
      copy<shape::kBlock, kDepth, shape::kAColumns>(a_, 0, step * kDepth, stage, 0, 0);
    }
    if constexpr (shape::kProduct != Product::kSdd) {
      // A step takes whole blocks, or half a one.
      constexpr int kPiece = shape::kBlock < kDepth ? shape::kBlock : kDepth;
#pragma unroll
      for (int at = 0; at < kDepth; at += kPiece) {
        copy_piece<kPiece>(first_ + (step * kDepth + at) / shape::kBlock,
                           step * kDepth % shape::kBlock, at, stage, tile_b);
      }
    }
  }

 private:
  static constexpr int kBlocksWide = kWide / shape::kBlock;

  /// Of the line's block `i`; a block that it does not have is zero.
  __device__ Part weight(int i, int start) const {
    Part part = blocks_.weight(layout_.column_indices[min(i, end_ - 1)], start);
    if (i >= end_) part.rows = 0;
    return part;
  }

  /// kPiece elements of the sum from element `from` of the line's block `i` on, to element `at`.
  template <int kPiece>
  __device__ void copy_piece(int i, int from, int at, uint32_t tile_a, uint32_t tile_b) const {
    const int start = place_.across * kWide;
    if constexpr (shape::kProduct == Product::kDsd) {
      const Part w = weight(i, start);
      if constexpr (shape::kTransposedB) {
        copy<kWide, kPiece, kDepth>(w.transposed(), 0, from, tile_b, 0, at);
      } else {
        copy<kPiece, kWide, kWide>(w, from, 0, tile_b, at, 0);
      }
    } else {
      const int known = min(i, end_ - 1);
      Part s = blocks_.values(layout_.transposed_order[known]);
      Part d = blocks_.dense(layout_.transposed_rows[known], start);
      if (i >= end_) s.rows = d.rows = 0;
      copy<kPiece, shape::kBlock, shape::kBlock>(s, from, 0, tile_a, at, 0);
      copy<kPiece, kWide, kWide>(d, from, 0, tile_b, at, 0);
    }
  }

  /// kRows x kColumns elements from (row, column) of a panel whose columns are neighbours in memory,
  /// to (at_row, at_column) of a tile with kTileColumns.
  template <int kRows, int kColumns, int kTileColumns>
  __device__ void copy(const Part& panel, int row, int column, uint32_t tile, int at_row,
                       int at_column) const {
    constexpr int kPacks = kColumns / kPack;
    static_assert(kRows * kPacks % shape::kThreads == 0);
#pragma unroll
    for (int i = 0; i < kRows * kPacks / shape::kThreads; ++i) {
      const int index = threadIdx.x + i * shape::kThreads;
      const int r = index / kPacks;
      const int pack = index % kPacks;
      const uint32_t target =
          tile + pack_offset<kTileColumns>(at_row + r, at_column / kPack + pack);
      const int from_row = row + r;
      const int from_column = column + pack * kPack;
      const scalar_t* source = &panel.at(from_row, from_column);
      if (packed_) {
        tiles::copy_16(target, source, panel.inside(from_row, from_column));
      } else {
        copy_elements(panel, from_row, from_column, source, target);
      }
    }
  }
  __device__ static void copy_elements(const Part& panel, int row, int column,
                                       const scalar_t* source, uint32_t target) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto bits = [&](int j) -> uint32_t {
        return panel.inside(row, column + j) ? reinterpret_cast<const uint16_t*>(source)[j] : 0;
      };
      words[i] = bits(2 * i) | bits(2 * i + 1) << 16;
    }
    store_shared(target, words);
  }

  Blocks<scalar_t> blocks_;
  const Layout& layout_;
  TilePlace place_;
  bool packed_;
  int first_;  // of the line's blocks
  int end_;
  int steps_;
  Part a_;  // of all steps, where they have it in common
  Part b_[kBlocksWide];
};

/// A warp's part of a tile.
template <typename shape>
class Sums {
 public:
  using scalar_t = typename shape::scalar_t;

  __device__ Sums()
      : first_row_(threadIdx.x / kWarp % shape::kRowWarps * kWarpRows),
        first_column_(threadIdx.x / kWarp / shape::kRowWarps * shape::kWarpColumns) {}

  /// += the products of a stage.
  __device__ void add(uint32_t stage) {
    const int lane = threadIdx.x % kWarp;
    const int low = lane % 8 + lane / 8 % 2 * 8;  // of 16: matrices 0 and 2 the first half
    const int high = lane % 8 + lane / 16 * 8;    // of 16: matrices 0 and 1
    const uint32_t tile_b = stage + shape::kABytes;
#pragma unroll
    for (int depth = 0; depth < kDepth; depth += 16) {
      uint32_t a[kRowPieces][4];
#pragma unroll
      for (int i = 0; i < kRowPieces; ++i) {
        const int row = first_row_ + i * 16;
        const uint32_t offset =
            shape::kTransposedA
                ? pack_offset<shape::kAColumns>(depth + high, row / kPack + lane / 8 % 2)
                : pack_offset<shape::kAColumns>(row + low, depth / kPack + lane / 16);
        ampere::load_matrices<shape::kTransposedA>(a[i], stage + offset);
      }
#pragma unroll
      for (int j = 0; j < kColumnPieces; j += 2) {
        const int column = first_column_ + j * 8;
        const uint32_t offset =
            shape::kTransposedB
                ? pack_offset<shape::kBColumns>(column + high, depth / kPack + lane / 8 % 2)
                : pack_offset<shape::kBColumns>(depth + low, column / kPack + lane / 16);
        uint32_t b[4];
        ampere::load_matrices<!shape::kTransposedB>(b, tile_b + offset);
#pragma unroll
        for (int i = 0; i < kRowPieces; ++i) {
          ampere::multiply_add(sums_[i][j], a[i], b[0], b[1], scalar_t{});
          ampere::multiply_add(sums_[i][j + 1], a[i], b[2], b[3], scalar_t{});
        }
      }
    }
  }

  /// To shared memory, [block, wide] or its transpose, rows of kPitch.
  template <bool kTransposed, int kPitch>
  __device__ void store(scalar_t* tile) const {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < kRowPieces; ++i) {
#pragma unroll
      for (int j = 0; j < kColumnPieces; ++j) {
#pragma unroll
        for (int element = 0; element < 4; ++element) {
          const int row = first_row_ + i * 16 + lane / 4 + element / 2 * 8;
          const int column = first_column_ + j * 8 + lane % 4 * 2 + element % 2;
          tile[kTransposed ? column * kPitch + row : row * kPitch + column] =
              static_cast<scalar_t>(sums_[i][j][element]);
        }
      }
    }
  }

 private:
  static constexpr int kRowPieces = kWarpRows / 16;
  static constexpr int kColumnPieces = shape::kWarpColumns / 8;

  int first_row_;
  int first_column_;
  float sums_[kRowPieces][kColumnPieces][4] = {};
};

/// kRows x kColumns elements of a tile in shared memory to a panel whose columns are neighbours.
template <int kRows, int kColumns, int kPitch, int kThreads, typename scalar_t>
__device__ void write(const scalar_t* tile, const Panel<scalar_t>& panel, bool packed) {
  constexpr int kPacks = kColumns / kPack;
  for (int index = threadIdx.x; index < kRows * kPacks; index += kThreads) {
    const int row = index / kPacks;
    const int column = index % kPacks * kPack;
    const scalar_t* source = tile + row * kPitch + column;
    if (packed) {
      if (panel.inside(row, column)) {
        *reinterpret_cast<uint4*>(&panel.at(row, column)) = *reinterpret_cast<const uint4*>(source);
      }
    } else {
      for (int i = 0; i < kPack; ++i) {
        if (panel.inside(row, column + i)) panel.at(row, column + i) = source[i];
      }
    }
  }
}

template <typename shape>
__global__ void __launch_bounds__(shape::kThreads, shape::kBlock == 128 ? 1 : 3)
    tensor_cores_kernel(const __grid_constant__ Arguments arguments, int lines, int across,
                        bool packed) {
  using scalar_t = typename shape::scalar_t;
  extern __shared__ __align__(128) uint8_t memory[];
  const uint32_t stages = tiles::shared_address(memory);
  const TilePlace place = tile_place(blockIdx.x, lines, across, kBandRows / shape::kBlock);
  const Fetch<shape> fetch(arguments, place, packed);
  Sums<shape> sums;
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < fetch.steps()) fetch(step, stages + step * shape::kStageBytes);
    tiles::commit_copies();
  }
  int stage = 0;
#pragma unroll 1
  for (int step = 0; step < fetch.steps(); ++step) {
    tiles::wait_copies<kStages - 2>();
    __syncthreads();
    const int ahead = step + kStages - 1;
    const int free_stage = stage == 0 ? kStages - 1 : stage - 1;
    if (ahead < fetch.steps()) fetch(ahead, stages + free_stage * shape::kStageBytes);
    tiles::commit_copies();
    sums.add(stages + stage * shape::kStageBytes);
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
  tiles::wait_copies<0>();
  __syncthreads();

  auto* const tile = reinterpret_cast<scalar_t*>(memory);
  const Blocks<scalar_t> blocks(arguments);
  const int start = place.across * kWide;
  if constexpr (shape::kProduct == Product::kDds && shape::kWidthLast) {
    constexpr int kPitch = shape::kBlock + kPack;
    sums.template store<true, kPitch>(tile);
    __syncthreads();
    write<kWide, shape::kBlock, kPitch, shape::kThreads>(
        tile, blocks.weight(place.line, start).transposed(), packed);
  } else {
    constexpr int kPitch = kWide + kPack;
    sums.template store<false, kPitch>(tile);
    __syncthreads();
    Panel<scalar_t> out;
    if constexpr (shape::kProduct == Product::kSdd) {
      out = blocks.values_of_row(place.line, start);
    } else if constexpr (shape::kProduct == Product::kDsd) {
      out = blocks.dense(place.line, start);
    } else {
      out = blocks.weight(place.line, start);
    }
    write<shape::kBlock, kWide, kPitch, shape::kThreads>(tile, out, packed);
  }
}

template <typename shape>
void launch(const Arguments& arguments, cudaStream_t stream) {
  const Layout& layout = arguments.layout;
  const int64_t lines = lines_of(shape::kProduct, layout);
  const int64_t across =
      cuda::divide_up(shape::kProduct == Product::kSdd ? layout.width : arguments.k, kWide);
  const unsigned grid = cuda::grid_size(lines * across);
  if (grid == 0) return;
  const bool packed = arguments.k % kPack == 0 &&
                      cuda::aligned_rows(layout.width * static_cast<int64_t>(sizeof(uint16_t)),
                                         arguments.values, arguments.dense, arguments.weight);
  const auto kernel = tensor_cores_kernel<shape>;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  shape::kSharedBytes),
             "cudaFuncSetAttribute");
  kernel<<<grid, shape::kThreads, shape::kSharedBytes, stream>>>(arguments, static_cast<int>(lines),
                                                                 static_cast<int>(across), packed);
  check_launch("block_sparse");
}

template <typename scalar_t>
void launch(Product product, const Arguments& arguments, cudaStream_t stream) {
  dispatch_product(product, arguments.layout.block, [&](auto kProduct, auto kBlock) {
    if (arguments.width_last) {
      launch<Shape<scalar_t, kBlock, kProduct, true>>(arguments, stream);
    } else {
      launch<Shape<scalar_t, kBlock, kProduct, false>>(arguments, stream);
    }
  });
}

}  // namespace

void launch_tensor_cores(Product product, cuda::Scalar scalar, const Arguments& arguments,
                         cudaStream_t stream) {
  if (scalar == cuda::Scalar::kBFloat16) {
    launch<__nv_bfloat16>(product, arguments, stream);
  } else {
    launch<__half>(product, arguments, stream);
  }
}

}  // namespace anabranch::block_sparse
