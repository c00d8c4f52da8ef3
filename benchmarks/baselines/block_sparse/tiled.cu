// The products of fp32 and fp64 by ordinary arithmetic, for every block: one block of the result for
// each CTA.
#include "baselines/block_sparse/blocks.cuh"
#include "baselines/block_sparse/launch.h"
#include "kernels/cuda/device.cuh"

namespace anabranch::block_sparse {
namespace {

constexpr int kThreads = 256;
constexpr int kSide = 16;  // threads along each side of a tile
static_assert(kThreads == kSide * kSide);

/// The sums of a tile of kBlock x kBlock: each thread has groups of neighbouring rows and columns, a
/// group for each load of 16 bytes from shared memory.
template <typename scalar_t, int kBlock>
class Sums {
 public:
  /// += a · b, as far as a has columns.
  __device__ void add(const Panel<scalar_t>& a, const Panel<scalar_t>& b) {
    __shared__ alignas(16) scalar_t tile_a[2][kDepth][kPitch];
    __shared__ alignas(16) scalar_t tile_b[2][kDepth][kPitch];
    const Panel<scalar_t> a_transposed = a.transposed();
    scalar_t next_a[kCopies];
    scalar_t next_b[kCopies];
    load(a_transposed, 0, next_a);
    load(b, 0, next_b);
    __syncthreads();  // the last call's tiles have been read
    int buffer = 0;
    for (int start = 0; start < a.columns; start += kDepth) {
      keep(a_transposed, next_a, tile_a[buffer]);
      keep(b, next_b, tile_b[buffer]);
      __syncthreads();
      if (start + kDepth < a.columns) {
        load(a_transposed, start + kDepth, next_a);
        load(b, start + kDepth, next_b);
      }
#pragma unroll 2
      for (int depth = 0; depth < kDepth; ++depth) {
        Group rows[kGroups];
        Group columns[kGroups];
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
          rows[i] = *reinterpret_cast<const Group*>(&tile_a[buffer][depth][place(row(), i)]);
          columns[i] = *reinterpret_cast<const Group*>(&tile_b[buffer][depth][place(column(), i)]);
        }
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
#pragma unroll
          for (int j = 0; j < kOwn; ++j) {
            sums_[i][j] += rows[i / kGroup].of[i % kGroup] * columns[j / kGroup].of[j % kGroup];
          }
        }
      }
      buffer ^= 1;
    }
  }

  __device__ void store(const Panel<scalar_t>& c) const {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
#pragma unroll
      for (int j = 0; j < kOwn; ++j) {
        const int r = place(row(), i / kGroup) + i % kGroup;
        const int s = place(column(), j / kGroup) + j % kGroup;
        if (c.inside(r, s)) {
          c.at(r, s) = sums_[i][j];
        }
      }
    }
  }

 private:
  static constexpr int kOwn = kBlock / kSide;
  static constexpr int kPackSize = cuda::kPackSize<scalar_t>;
  static constexpr int kGroup = kOwn < kPackSize ? kOwn : kPackSize;
  static constexpr int kGroups = kOwn / kGroup;
  static constexpr int kDepth = 64 / sizeof(scalar_t);
  static constexpr int kPitch = kBlock + kPackSize;
  static constexpr int kCopies = kDepth * kBlock / kThreads;
  static_assert(kDepth * kBlock % kThreads == 0);

  struct alignas(kGroup * sizeof(scalar_t)) Group {
    scalar_t of[kGroup];
  };

  __device__ static int row() { return threadIdx.x / kSide; }
  __device__ static int column() { return threadIdx.x % kSide; }
  /// The first element of a thread's group `i`.
  __device__ static int place(int thread, int i) { return (i * kSide + thread) * kGroup; }

  /// Which elements a thread copies: the first, and how far apart. Whichever index runs along memory
  /// runs along the threads.
  struct Copies {
    int depth;
    int across;
    int depth_step;
    int across_step;

    __device__ explicit Copies(const Panel<scalar_t>& panel) {
      const int thread = threadIdx.x;
      const bool along_rows = panel.column_step == 1;
      depth = along_rows ? thread / kBlock : thread % kDepth;
      across = along_rows ? thread % kBlock : thread / kDepth;
      depth_step = along_rows ? kThreads / kBlock : 0;
      across_step = along_rows ? 0 : kThreads / kDepth;
    }
  };

  /// kDepth x kBlock elements from row `start`.
  __device__ static void load(const Panel<scalar_t>& panel, int start, scalar_t (&out)[kCopies]) {
    const Copies mine(panel);
    const scalar_t* const first = &panel.at(start + mine.depth, mine.across);
    const int64_t step = static_cast<int64_t>(mine.depth_step) * panel.row_step +
                         static_cast<int64_t>(mine.across_step) * panel.column_step;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const bool inside = panel.inside(start + mine.depth + i * mine.depth_step,
                                       mine.across + i * mine.across_step);
      out[i] = inside ? first[i * step] : scalar_t{0};
    }
  }
  __device__ static void keep(const Panel<scalar_t>& panel, const scalar_t (&values)[kCopies],
                              scalar_t (&tile)[kDepth][kPitch]) {
    const Copies mine(panel);
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      tile[mine.depth + i * mine.depth_step][mine.across + i * mine.across_step] = values[i];
    }
  }

  scalar_t sums_[kOwn][kOwn] = {};
};

template <typename scalar_t, int kBlock, Product kProduct>
__global__ void __launch_bounds__(kThreads, sizeof(scalar_t) == 4 ? 2 : 1)
    tiled_kernel(const __grid_constant__ Arguments arguments, int lines, int across) {
  const Blocks<scalar_t> blocks(arguments);
  const Layout& layout = arguments.layout;
  const TilePlace place = tile_place(blockIdx.x, lines, across, kBandRows / kBlock);
  const int start = place.across * kBlock;  // of k
  Sums<scalar_t, kBlock> sums;
  if constexpr (kProduct == Product::kSdd) {
    const int i = layout.row_offsets[place.line] + place.across;
    sums.add(blocks.dense(place.line, 0), blocks.weight(layout.column_indices[i], 0).transposed());
    sums.store(blocks.values(i));
  } else if constexpr (kProduct == Product::kDsd) {
    for (int i = layout.row_offsets[place.line]; i < layout.row_offsets[place.line + 1]; ++i) {
      sums.add(blocks.values(i), blocks.weight(layout.column_indices[i], start));
    }
    sums.store(blocks.dense(place.line, start));
  } else {
    for (int i = layout.column_offsets[place.line]; i < layout.column_offsets[place.line + 1];
         ++i) {
      sums.add(blocks.values(layout.transposed_order[i]).transposed(),
               blocks.dense(layout.transposed_rows[i], start));
    }
    sums.store(blocks.weight(place.line, start));
  }
}

template <typename scalar_t, int kBlock, Product kProduct>
void launch(const Arguments& arguments, cudaStream_t stream) {
  const Layout& layout = arguments.layout;
  const int64_t lines = lines_of(kProduct, layout);
  const int64_t across =
      kProduct == Product::kSdd ? layout.expert_columns : cuda::divide_up(arguments.k, kBlock);
  const unsigned grid = cuda::grid_size(lines * across);
  if (grid == 0) return;
  tiled_kernel<scalar_t, kBlock, kProduct>
      <<<grid, kThreads, 0, stream>>>(arguments, static_cast<int>(lines), static_cast<int>(across));
  check_launch("block_sparse");
}

}  // namespace

void launch_tiled(Product product, cuda::Scalar scalar, const Arguments& arguments,
                  cudaStream_t stream) {
  dispatch_product(product, arguments.layout.block, [&](auto kProduct, auto kBlock) {
    if (scalar == cuda::Scalar::kDouble) {
      launch<double, kBlock, kProduct>(arguments, stream);
    } else {
      launch<float, kBlock, kProduct>(arguments, stream);
    }
  });
}

}  // namespace anabranch::block_sparse
