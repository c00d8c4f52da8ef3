// The products with blocks of 128 on compute capability 9.0: a persistent kernel in which one warp
// lets TMA fetch boxes of 64 x 64 elements, found through the topology, and two
// warpgroups multiply them.
//
// A tile is one block of S by 256 elements: two blocks of a block row beside one another (SDD), or a
// block row or column and 256 of k (DSD, DDS). A block's rows end at its last token: see rows_map.
#include "baselines/block_sparse/blocks.cuh"
#include "baselines/block_sparse/hopper_launch.h"
#include "gemm/hopper/epilogue.cuh"
#include "gemm/hopper/ptx.cuh"
#include "gemm/hopper/wgmma.cuh"
#include "kernels/cuda/device.cuh"

namespace anabranch::block_sparse {
namespace {

using hopper::BoxCoordinates;
using hopper::kBox;
using hopper::kBoxBytes;
using hopper::kRowsEnd;
using hopper::kRowsWrap;
using hopper::kThreads;
using hopper::kWarpgroup;

constexpr int kBlock = 128;
constexpr int kWide = 256;  // the other side of a tile

/// A tile's rows are those of a block, but for W = Dᵀ · S: there the block gives the columns.
template <Product kProduct_, bool kWidthLast_>
struct Shape {
  static constexpr Product kProduct = kProduct_;
  static constexpr bool kWidthLast = kWidthLast_;
  static constexpr bool kTall = kProduct == Product::kDds && kWidthLast;
  static constexpr bool kTransposedA = kProduct == Product::kDds;
  static constexpr bool kTransposedB =
      kProduct == Product::kDds || (kProduct == Product::kSdd) == kWidthLast;
  static constexpr int kABoxes = (kTall ? kWide : kBlock) / kBox;
  static constexpr int kBBoxes = (kTall ? kBlock : kWide) / kBox;
  static constexpr int kColumns = kBBoxes * kBox;
  static constexpr int kRowBoxes = kABoxes / 2;  // of each warpgroup
  static constexpr int kStages = 4;
  static constexpr int kStagingBoxes = 2;
  static constexpr int kStageBytes = (kABoxes + kBBoxes) * kBoxBytes;
  static constexpr int kSharedBytes =
      1024 + kStages * (kStageBytes + 2 * 8) + 2 * kStagingBoxes * kBoxBytes;
};

template <typename shape>
using Accumulators = float[shape::kRowBoxes][shape::kColumns / 2];

/// A tile and what it is summed over.
struct Tile {
  int line;    // block row; of kDds, block column
  int across;  // tile of the other side
  int first;   // of the line's blocks, in the product's order; of kSdd, of the tile's
  int steps;   // of 64 elements of the sum
};

/// Walks over this CTA's tiles: the same ones, in the same order, for all of its warps.
template <typename shape>
class Tiles {
 public:
  __device__ explicit Tiles(const Arguments& arguments)
      : layout_(arguments.layout), k_(arguments.k), tile_(blockIdx.x) {
    const bool sdd = shape::kProduct == Product::kSdd;
    lines_ =
        static_cast<int>(shape::kProduct == Product::kDds ? layout_.experts * layout_.expert_columns
                                                          : layout_.block_rows);
    tiles_across_ =
        static_cast<int>(sdd ? (layout_.expert_columns + 1) / 2 : (k_ + kWide - 1) / kWide);
  }

  __device__ bool next(Tile& tile) {
    if (tile_ >= static_cast<int64_t>(lines_) * tiles_across_) {
      return false;
    }
    const TilePlace place = tile_place(tile_, lines_, tiles_across_, kBandRows / kBlock);
    tile.line = place.line;
    tile.across = place.across;
    const int32_t* offsets =
        shape::kProduct == Product::kDds ? layout_.column_offsets : layout_.row_offsets;
    tile.first = offsets[tile.line];
    tile.steps = (offsets[tile.line + 1] - tile.first) * (kBlock / kBox);
    if constexpr (shape::kProduct == Product::kSdd) {
      tile.first += 2 * tile.across;
      tile.steps = static_cast<int>((k_ + kBox - 1) / kBox);
    }
    tile_ += gridDim.x;
    return true;
  }

 private:
  const Layout& layout_;
  int64_t k_;
  int64_t tile_;
  int lines_;
  int tiles_across_;
};

/// The tokens of a block row, in S (whose columns are those of the block row) or D.
struct Rows {
  int y;
  int z;

  __device__ Rows(const Layout& layout, int block_row) {
    const int tokens = layout.block_tokens[block_row];
    y = kRowsEnd - tokens;  // see hopper::rows_map
    z = static_cast<int>(layout.first_token[block_row]) + tokens;
  }
  __device__ BoxCoordinates box(int token, int column) const {
    return {column, y + token, z, kRowsWrap};
  }
};

/// A block column's part of W.
template <bool kWidthLast>
struct Columns {
  int expert;
  int first;  // among the expert's

  __device__ Columns(const Layout& layout, int block_column) {
    const int columns = static_cast<int>(layout.expert_columns);
    expert = block_column / columns;
    first = (block_column - expert * columns) * kBlock;
  }
  __device__ BoxCoordinates box(int column, int k) const {
    if constexpr (kWidthLast) {
      return {first + column, k, expert, 0};
    } else {
      return {k, first + column, expert, 0};
    }
  }
};

struct Ring {
  int stage = 0;
  uint32_t parity = 0;

  __device__ void advance(int stages) {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

struct SharedMemory {
  uint32_t stages;
  uint32_t staging;
  uint32_t full;  // barriers
  uint32_t empty;
};

/// Fetches the boxes of a tile, a step's into each stage.
template <typename shape>
class Fetch {
 public:
  __device__ Fetch(const Arguments& arguments, const HopperMaps& maps, const Tile& tile)
      : layout_(arguments.layout),
        maps_(maps),
        tile_(tile),
        rows_(layout_, shape::kProduct == Product::kDds ? 0 : tile.line),
        columns_{{layout_, column_of(0)}, {layout_, column_of(1)}} {
    // A block that the row does not have lies outside of W.
    if (shape::kProduct == Product::kSdd && !has(1)) {
      columns_[1].first = static_cast<int>(layout_.width);
    }
  }

  __device__ void operator()(int step, uint32_t target, uint32_t full) {
    if constexpr (shape::kProduct == Product::kSdd) {
      sdd(step, target, full);
    } else if constexpr (shape::kProduct == Product::kDsd) {
      dsd(step, target, full);
    } else {
      dds(step, target, full);
    }
  }

 private:
  /// Whether the tile of kSdd has its second block.
  __device__ bool has(int block) const {
    return tile_.first + block < layout_.row_offsets[tile_.line + 1];
  }
  __device__ int column_of(int block) const {
    if constexpr (shape::kProduct == Product::kSdd) {
      return layout_.column_indices[tile_.first + (has(block) ? block : 0)];
    } else {
      return 0;
    }
  }

  /// S = D · W: a step is 64 of k.
  __device__ void sdd(int step, uint32_t target, uint32_t full) const {
    const int k = step * kBox;
#pragma unroll
    for (int i = 0; i < shape::kABoxes; ++i) {
      hopper::load_box(maps_.dense, rows_.box(i * kBox, k), target + i * kBoxBytes, full);
    }
#pragma unroll
    for (int j = 0; j < shape::kBBoxes; ++j) {
      hopper::load_box(maps_.weight, columns_[j / 2].box(j % 2 * kBox, k),
                       target + (shape::kABoxes + j) * kBoxBytes, full);
    }
  }

  /// D = S · W: a step is half a block of the row.
  __device__ void dsd(int step, uint32_t target, uint32_t full) {
    const int within = step % 2 * kBox;
    if (within == 0) {
      columns_[0] = {layout_, layout_.column_indices[tile_.first + step / 2]};
    }
#pragma unroll
    for (int i = 0; i < shape::kABoxes; ++i) {
      hopper::load_box(maps_.values, rows_.box(i * kBox, step * kBox), target + i * kBoxBytes,
                       full);
    }
#pragma unroll
    for (int j = 0; j < shape::kBBoxes; ++j) {
      hopper::load_box(maps_.weight, columns_[0].box(within, tile_.across * kWide + j * kBox),
                       target + (shape::kABoxes + j) * kBoxBytes, full);
    }
  }

  /// W = Sᵀ · D or Dᵀ · S: a step is half the tokens of a block of the column.
  __device__ void dds(int step, uint32_t target, uint32_t full) {
    const int token = step % 2 * kBox;
    if (token == 0) {
      const int place = tile_.first + step / 2;
      const int row = layout_.transposed_rows[place];
      rows_ = {layout_, row};
      values_column_ = (layout_.transposed_order[place] - layout_.row_offsets[row]) * kBlock;
    }
    constexpr int kValuesAt = shape::kTall ? shape::kABoxes : 0;
    constexpr int kDenseAt = shape::kTall ? 0 : shape::kABoxes;
#pragma unroll
    for (int i = 0; i < kBlock / kBox; ++i) {
      hopper::load_box(maps_.values, rows_.box(token, values_column_ + i * kBox),
                       target + (kValuesAt + i) * kBoxBytes, full);
    }
#pragma unroll
    for (int i = 0; i < kWide / kBox; ++i) {
      hopper::load_box(maps_.dense, rows_.box(token, tile_.across * kWide + i * kBox),
                       target + (kDenseAt + i) * kBoxBytes, full);
    }
  }

  const Layout& layout_;
  const HopperMaps& maps_;
  Tile tile_;
  Rows rows_;                              // of the line, or of the step
  Columns<shape::kWidthLast> columns_[2];  // of the tile's blocks, or of the step's
  int values_column_ = 0;
};

/// One thread fills the ring.
template <typename shape>
__device__ void load(const Arguments& arguments, const HopperMaps& maps,
                     const SharedMemory& shared) {
  Tiles<shape> tiles(arguments);
  Ring ring;
  Tile tile;
  while (tiles.next(tile)) {
    if (tile.steps == 0) continue;
    Fetch<shape> fetch(arguments, maps, tile);
#pragma unroll 1
    for (int step = 0; step < tile.steps; ++step) {
      const uint32_t full = shared.full + ring.stage * 8;
      hopper::wait(shared.empty + ring.stage * 8, ring.parity ^ 1);
      hopper::arrive_expecting(full, shape::kStageBytes);
      fetch(step, shared.stages + ring.stage * shape::kStageBytes, full);
      ring.advance(shape::kStages);
    }
  }
}

/// The products of one tile, of a warpgroup's rows from box `first_box` on.
template <typename scalar_t, typename shape>
__device__ __forceinline__ void multiply(Accumulators<shape>& sums, int steps, int first_box,
                                         const SharedMemory& shared, Ring& ring) {
  using Product = hopper::WarpgroupProduct<shape::kColumns>;
  const auto release = [&](int stage) {
    if (threadIdx.x % 32 == 0) hopper::arrive(shared.empty + stage * 8);
  };
  int previous = 0;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    const uint32_t stage = shared.stages + ring.stage * shape::kStageBytes;
    hopper::wait(shared.full + ring.stage * 8, ring.parity);
    const uint64_t a =
        hopper::matrix_descriptor<shape::kTransposedA>(stage + first_box * kBoxBytes);
    const uint64_t b =
        hopper::matrix_descriptor<shape::kTransposedB>(stage + shape::kABoxes * kBoxBytes);
    hopper::begin_products();
#pragma unroll
    for (int part = 0; part < kBox / 16; ++part) {
#pragma unroll
      for (int i = 0; i < shape::kRowBoxes; ++i) {
        Product::template multiply<scalar_t, shape::kTransposedA, shape::kTransposedB>(
            sums[i], a + part * hopper::kDescriptorStep<shape::kTransposedA> + i * (kBoxBytes >> 4),
            b + part * hopper::kDescriptorStep<shape::kTransposedB>, step > 0 || part > 0);
      }
    }
    hopper::commit_products();
    hopper::wait_products<1>();
    if (step > 0) {
      release(previous);
    }
    previous = ring.stage;
    ring.advance(shape::kStages);
  }
  hopper::wait_products<0>();
  if (steps > 0) {
    release(previous);
  }
}

template <typename scalar_t, typename shape>
struct Boxes : hopper::Staging<scalar_t, shape> {
  using hopper::Staging<scalar_t, shape>::write;
};

/// A warpgroup's way to memory, through its staging boxes.
template <typename scalar_t, typename shape>
class Store {
 public:
  __device__ Store(const Arguments& arguments, const HopperMaps& maps, uint32_t staging,
                   int warpgroup)
      : layout_(arguments.layout),
        k_(static_cast<int>(arguments.k)),
        maps_(maps),
        staging_(staging + warpgroup * shape::kStagingBoxes * kBoxBytes),
        barrier_(1 + warpgroup) {}

  __device__ void operator()(const Tile& tile, int first_box, const Accumulators<shape>& sums) {
    // A sum of nothing is zero, and its registers hold anything.
    const uint32_t mask = tile.steps == 0 ? 0 : 0xFFFFFFFF;
#pragma unroll
    for (int i = 0; i < shape::kRowBoxes; ++i) {
#pragma unroll
      for (int begin = 0; begin < shape::kBBoxes; begin += shape::kStagingBoxes) {
        if (elected()) hopper::wait_stores_read<0>();
        hopper::sync_threads(barrier_, kWarpgroup);
#pragma unroll
        for (int j = 0; j < shape::kStagingBoxes; ++j) {
          Boxes<scalar_t, shape>::write(&sums[i][(begin + j) * 32], staging_ + j * kBoxBytes, mask);
        }
        hopper::fence_shared_writes();
        hopper::sync_threads(barrier_, kWarpgroup);
        if (elected()) {
#pragma unroll
          for (int j = 0; j < shape::kStagingBoxes; ++j) {
            box(tile, first_box + i, begin + j, staging_ + j * kBoxBytes);
          }
          hopper::commit_stores();
        }
      }
    }
  }

 private:
  __device__ static bool elected() { return threadIdx.x % kWarpgroup == 0; }

  /// Box (i, j) of the tile, unless it lies outside.
  __device__ void box(const Tile& tile, int i, int j, uint32_t source) const {
    const int row = i * kBox;
    if constexpr (shape::kProduct == Product::kDds) {
      const Columns<shape::kWidthLast> columns(layout_, tile.line);
      const int column = shape::kTall ? j * kBox : row;
      const int k = tile.across * kWide + (shape::kTall ? row : j * kBox);
      if (k < k_ && columns.first + column < layout_.width) {
        hopper::store_box(maps_.weight, columns.box(column, k), source);
      }
    } else {
      const bool sdd = shape::kProduct == Product::kSdd;
      const int column = tile.across * kWide + j * kBox;
      if (row < layout_.block_tokens[tile.line] && column < (sdd ? layout_.width : k_)) {
        hopper::store_box(sdd ? maps_.values : maps_.dense,
                          Rows(layout_, tile.line).box(row, column), source);
      }
    }
  }

  const Layout& layout_;
  int k_;
  const HopperMaps& maps_;
  uint32_t staging_;
  int barrier_;
};

template <typename scalar_t, typename shape>
__global__ void __launch_bounds__(kThreads, 1)
    block_sparse_kernel(const __grid_constant__ HopperMaps maps,
                        const __grid_constant__ Arguments arguments) {
  extern __shared__ uint8_t memory[];
  SharedMemory shared;
  shared.stages = (hopper::shared_address(memory) + 1023) / 1024 * 1024;
  shared.staging = shared.stages + shape::kStages * shape::kStageBytes;
  shared.full = shared.staging + 2 * shape::kStagingBoxes * kBoxBytes;
  shared.empty = shared.full + shape::kStages * 8;
  if (threadIdx.x == 0) {
    constexpr int kReleasingWarps = 8;
    for (int stage = 0; stage < shape::kStages; ++stage) {
      hopper::init_barrier(shared.full + stage * 8, 1);
      hopper::init_barrier(shared.empty + stage * 8, kReleasingWarps);
    }
    hopper::fence_barrier_init();
    hopper::prefetch_map(maps.values);
    hopper::prefetch_map(maps.dense);
    hopper::prefetch_map(maps.weight);
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroup) {
    hopper::give_registers<40>();
    if (threadIdx.x == 0) {
      load<shape>(arguments, maps, shared);
    }
  } else {
    hopper::take_registers<232>();
    const int warpgroup = threadIdx.x / kWarpgroup - 1;
    const int first_box = warpgroup * shape::kRowBoxes;
    Store<scalar_t, shape> store(arguments, maps, shared.staging, warpgroup);
    Tiles<shape> tiles(arguments);
    Ring ring;
    Tile tile;
    while (tiles.next(tile)) {
      Accumulators<shape> sums;
      multiply<scalar_t, shape>(sums, tile.steps, first_box, shared, ring);
      store(tile, first_box, sums);
    }
    hopper::wait_stores();
  }
}

template <typename scalar_t, typename shape>
void launch(const HopperMaps& maps, const Arguments& arguments, cudaStream_t stream) {
  const auto kernel = block_sparse_kernel<scalar_t, shape>;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  shape::kSharedBytes),
             "cudaFuncSetAttribute");
  kernel<<<cuda::grid_size(cuda::multiprocessors()), kThreads, shape::kSharedBytes, stream>>>(
      maps, arguments);
  check_launch("block_sparse");
}

template <typename scalar_t, bool kWidthLast>
void launch(Product product, const HopperMaps& maps, const Arguments& arguments,
            cudaStream_t stream) {
  switch (product) {
    case Product::kSdd:
      return launch<scalar_t, Shape<Product::kSdd, kWidthLast>>(maps, arguments, stream);
    case Product::kDsd:
      return launch<scalar_t, Shape<Product::kDsd, kWidthLast>>(maps, arguments, stream);
    case Product::kDds:
      return launch<scalar_t, Shape<Product::kDds, kWidthLast>>(maps, arguments, stream);
  }
}

template <typename scalar_t>
void launch(Product product, const HopperMaps& maps, const Arguments& arguments,
            cudaStream_t stream) {
  if (arguments.width_last) {
    launch<scalar_t, true>(product, maps, arguments, stream);
  } else {
    launch<scalar_t, false>(product, maps, arguments, stream);
  }
}

}  // namespace

void launch_hopper(Product product, cuda::Scalar scalar, const HopperMaps& maps,
                   const Arguments& arguments, cudaStream_t stream) {
  if (scalar == cuda::Scalar::kBFloat16) {
    launch<__nv_bfloat16>(product, maps, arguments, stream);
  } else {
    launch<__half>(product, maps, arguments, stream);
  }
}

}  // namespace anabranch::block_sparse
