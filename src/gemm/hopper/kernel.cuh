#pragma once

// One persistent kernel for the three products of a grouped GEMM, c = a · b for every expert.
//
// Every matrix is read and written by TMA in boxes of 64 rows by 64 elements. Rows of tokens lie
// expert-major: their tensor maps end at an expert's last row (see rows_map), so that what lies beyond
// is read as zero and never written.
//
// A CTA is warp-specialised: one thread of the producer warpgroup fills a ring of stages in shared
// memory, two consumer warpgroups multiply what lies there and run the epilogue, pingpong or
// cooperatively (see Tiling). Which tile comes next is the tile scheduler's.
#include "gemm/hopper/epilogue.cuh"
#include "gemm/hopper/gather.cuh"
#include "gemm/hopper/ptx.cuh"
#include "gemm/hopper/shape.cuh"
#include "gemm/hopper/wgmma.cuh"

namespace anabranch::hopper {

/// The ring of stages in shared memory: where it stands, and the parity of its round.
template <typename shape>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;

  __device__ void advance() {
    if (++stage == shape::kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
  __device__ void advance(int steps) {
    const int target = stage + steps;
    parity ^= (target / shape::kStages) & 1;
    stage = target % shape::kStages;
  }
};

struct SharedMemory {
  uint32_t stages;
  uint32_t staging;
  uint32_t full;  // barriers
  uint32_t empty;
  uint32_t turn;  // to multiply, of each consumer, in pingpong
};

/// By one thread: the boxes of a block of the sum that TMA brings into the stage at `target`.
template <typename shape>
__device__ __forceinline__ void load_boxes(const Problem& problem, const Maps& maps,
                                           const Tile& tile, int block, uint32_t target,
                                           uint32_t full, uint32_t rank) {
  const Group& group = tile.group;
  const int rows_y = kRowsEnd - group.rows;  // see rows_map
  const int rows_z = group.first_row + group.rows;
  const int k = block * kBox;
  arrive_expecting(full, shape::kTmaBytes);
  if constexpr (shape::kGathered != Gathered::kA) {
#pragma unroll
    for (int i = 0; i < shape::kABoxes; ++i) {
      const int m = tile.row + i * kBox;
      const BoxCoordinates at = shape::kTransposedA
                                    ? BoxCoordinates{m, rows_y + k, rows_z, kRowsWrap}
                                    : BoxCoordinates{k, rows_y + m, rows_z, kRowsWrap};
      if constexpr (shape::kShare != Share::kA) {
        load_box(maps.a, at, target + i * kBoxBytes, full);
      } else if (i / (shape::kABoxes / 2) == rank) {
        load_box_multicast(maps.a, at, target + i * kBoxBytes, full, 3);
      }
    }
  }
  if constexpr (shape::kGathered != Gathered::kB) {
#pragma unroll
    for (int j = 0; j < shape::kBBoxes; ++j) {
      // The up part lies n columns behind the gate.
      constexpr int kAcross = shape::kTileColumns / kBox;
      const int n = tile.column + j % kAcross * kBox + j / kAcross * problem.n;
      BoxCoordinates at;
      if constexpr (shape::kOperation == Operation::kForward) {
        at = {k, n, group.expert, 0};
      } else if constexpr (shape::kOperation == Operation::kDgrad) {
        at = {n, k, group.expert, 0};
      } else {
        at = {n, rows_y + k, rows_z, kRowsWrap};
      }
      const uint32_t box = target + (shape::kABoxes + j) * kBoxBytes;
      if constexpr (shape::kShare != Share::kB) {
        load_box(maps.b, at, box, full);
      } else if (j / (shape::kBBoxes / 2) == rank) {
        load_box_multicast(maps.b, at, box, full, 3);
      }
    }
  }
}

/// The producer: one thread fills the ring.
template <typename shape>
__device__ void load(const Problem& problem, const Maps& maps, const SharedMemory& shared,
                     TileScheduler<shape> tiles) {
  const uint32_t rank = cluster_rank();
  Ring<shape> ring;
  Tile tile;
  while (tiles.next(tile)) {
#pragma unroll 1
    for (int block = 0; block < tile.k_blocks; ++block) {
      wait(shared.empty + ring.stage * 8, ring.parity ^ 1);
      load_boxes<shape>(problem, maps, tile, block, shared.stages + ring.stage * shape::kStageBytes,
                        shared.full + ring.stage * 8, rank);
      ring.advance();
    }
  }
}

/// By all threads of a producer that gathers: what TMA brings of a block, by thread `loader`, and what `copy` copies to
/// the stage at `target`.
template <typename shape, typename Copy>
__device__ __forceinline__ void load_block(const Problem& problem, const Maps& maps,
                                           const SharedMemory& shared, const Tile& tile, int block,
                                           Ring<shape>& ring, uint32_t rank, int loader,
                                           const Copy& copy) {
  const uint32_t full = shared.full + ring.stage * 8;
  const uint32_t target = shared.stages + ring.stage * shape::kStageBytes;
  wait(shared.empty + ring.stage * 8, ring.parity ^ 1);
  if (threadIdx.x == loader) {
    load_boxes<shape>(problem, maps, tile, block, target, full, rank);
  }
  copy(target);
  arrive_behind_copies(full);
  ring.advance();
}

/// The producer of forward or dgrad that gathers: all threads of its warpgroup.
template <typename scalar_t, typename shape>
__device__ void load_gathered_tiles(const Problem& problem, const Maps& maps,
                                    const SharedMemory& shared, TileScheduler<shape> tiles) {
  const uint32_t rank = cluster_rank();
  GatheredTile<scalar_t, shape> gathered(problem, maps.gathered);
  Ring<shape> ring;
  Tile tile;
  while (tiles.next(tile)) {
    gathered.begin(tile);
#pragma unroll 1
    for (int block = 0; block < tile.k_blocks; ++block) {
      load_block<shape>(problem, maps, shared, tile, block, ring, rank, /*loader=*/0,
                        [&](uint32_t target) { gathered.copy(block, target); });
    }
  }
}

/// The same of wgrad.
template <typename scalar_t, typename shape>
__device__ void load_gathered_sums(const Problem& problem, const Maps& maps,
                                   const SharedMemory& shared, TileScheduler<shape> tiles) {
  constexpr int kFirst = shape::kGathered == Gathered::kA ? 0 : shape::kABoxes * kBoxBytes;
  const uint32_t rank = cluster_rank();
  GatheredSum<scalar_t, shape> gathered(problem, maps.gathered);
  Ring<shape> ring;
  Tile tile, next;
  bool more = tiles.next(next);
  if (more) gathered.find_rows(next);
  while (more) {
    tile = next;
    gathered.begin();
    more = tiles.next(next);
    if (more) gathered.find_rows(next);
#pragma unroll 1
    for (int block = 0; block < tile.k_blocks; ++block) {
      // Each warp in turn loads.
      load_block<shape>(problem, maps, shared, tile, block, ring, rank, ring.stage % 4 * 32,
                        [&](uint32_t target) { gathered.copy(tile, block, target + kFirst); });
    }
  }
}

/// The products of one tile.
template <typename scalar_t, typename shape>
__device__ __forceinline__ void multiply(Accumulators<shape>& sums, int k_blocks, int first_box,
                                         const SharedMemory& shared, Ring<shape>& ring) {
  using Product = WarpgroupProduct<shape::kColumns>;
  const auto release = [&](int stage) {
    const uint32_t lane = threadIdx.x % 32;
    if (lane < shape::kClusterSize) arrive_at(shared.empty + stage * 8, lane);
  };
  int previous = 0;
#pragma unroll 1
  for (int block = 0; block < k_blocks; ++block) {
    const uint32_t stage = shared.stages + ring.stage * shape::kStageBytes;
    wait(shared.full + ring.stage * 8, ring.parity);
    if constexpr (shape::kGathers) fence_shared_writes();  // the copies, seen by the tensor cores
    const uint64_t a = matrix_descriptor<shape::kTransposedA>(stage + first_box * kBoxBytes);
    const uint64_t b = matrix_descriptor<shape::kTransposedB>(stage + shape::kABoxes * kBoxBytes);
    begin_products();
#pragma unroll
    for (int step = 0; step < kBox / 16; ++step) {
#pragma unroll
      for (int i = 0; i < shape::kRowBoxes; ++i) {
        Product::template multiply<scalar_t, shape::kTransposedA, shape::kTransposedB>(
            sums[i], a + step * kDescriptorStep<shape::kTransposedA> + i * (kBoxBytes >> 4),
            b + step * kDescriptorStep<shape::kTransposedB>, block > 0 || step > 0);
      }
    }
    commit_products();
    wait_products<1>();
    if (block > 0) {
      release(previous);
    }
    previous = ring.stage;
    ring.advance();
  }
  wait_products<0>();
  if (k_blocks > 0) {
    release(previous);
  }
}

/// A consumer warpgroup's tiles: products and epilogue of each.
template <typename scalar_t, typename shape>
__device__ void multiply_and_store(const Problem& problem, const Maps& maps,
                                   const SharedMemory& shared, TileScheduler<shape> tiles,
                                   int warpgroup) {
  EpilogueOf<scalar_t, shape> epilogue(
      problem, maps, shared.staging + warpgroup * shape::kStagingBoxes * kBoxBytes, 1 + warpgroup);
  const int first_box = shape::kPingpong ? 0 : warpgroup * shape::kRowBoxes;
  Ring<shape> ring;
  Tile tile;
  for (int i = 0; tiles.next(tile); ++i) {
    if (shape::kPingpong && i % 2 != warpgroup) {
      ring.advance(tile.k_blocks);
      continue;
    }
    Accumulators<shape> sums;
    epilogue.begin(tile, first_box);
    if constexpr (shape::kPingpong) {
      // The ring's parity tells a round from the one before it only: nobody may fall further behind.
      wait(shared.turn + warpgroup * 8, (i / 2 + 1 + warpgroup) & 1);
    }
    multiply<scalar_t, shape>(sums, tile.k_blocks, first_box, shared, ring);
    if constexpr (shape::kPingpong) {
      if (threadIdx.x % 32 == 0) arrive(shared.turn + (1 - warpgroup) * 8);
    }
    epilogue.finish(tile, first_box, sums);
  }
  wait_stores();
}

template <typename scalar_t, typename shape>
__global__ void __launch_bounds__(kThreads, 1)
    grouped_gemm_kernel(const __grid_constant__ Maps maps,
                        const __grid_constant__ Problem problem) {
  extern __shared__ uint8_t memory[];
  const uint32_t base = (shared_address(memory) + 1023) / 1024 * 1024;
  SharedMemory shared;
  shared.stages = base;
  shared.staging = shared.stages + shape::kStages * shape::kStageBytes;
  shared.full = shared.staging + 2 * shape::kStagingBoxes * kBoxBytes;
  shared.empty = shared.full + shape::kStages * 8;
  shared.turn = shared.empty + shape::kStages * 8;
  int* const first_unit =
      reinterpret_cast<int*>(memory + (shared.turn + 2 * 8 - shared_address(memory)));

  const int warp = threadIdx.x / 32;
  if (warp == 0) {
    count_units<shape>(problem, first_unit);
  } else if (threadIdx.x == 32) {
    constexpr int kReleasingWarps = (shape::kPingpong ? 4 : 8) * shape::kClusterSize;
    for (int stage = 0; stage < shape::kStages; ++stage) {
      init_barrier(shared.full + stage * 8, shape::kGathers ? 1 + kWarpgroup : 1);
      init_barrier(shared.empty + stage * 8, kReleasingWarps);
    }
    init_barrier(shared.turn, 4);
    init_barrier(shared.turn + 8, 4);
    fence_barrier_init();
    if constexpr (shape::kGathered != Gathered::kA) prefetch_map(maps.a);
    if constexpr (shape::kGathered != Gathered::kB) prefetch_map(maps.b);
    prefetch_map(maps.c);
  }
  __syncthreads();
  sync_cluster();
  const TileScheduler<shape> tiles(problem, first_unit, cluster_rank());
  if (warp < 4) {
    give_registers<shape::kProducerRegisters>();
    if constexpr (shape::kGathers && shape::kRaggedK) {
      load_gathered_sums<scalar_t, shape>(problem, maps, shared, tiles);
    } else if constexpr (shape::kGathers) {
      load_gathered_tiles<scalar_t, shape>(problem, maps, shared, tiles);
    } else if (threadIdx.x == 0) {
      load<shape>(problem, maps, shared, tiles);
    }
  } else {
    take_registers<shape::kConsumerRegisters>();
    multiply_and_store<scalar_t, shape>(problem, maps, shared, tiles, warp / 4 - 1);
  }
  __syncwarp();
  sync_cluster();  // no CTA leaves while the other may still write into it
}

}  // namespace anabranch::hopper
