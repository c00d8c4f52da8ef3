#pragma once

// The persistent kernel's tile scheduler: which tile of which expert a cluster multiplies next.
#include "gemm/hopper/problem.h"
#include "gemm/hopper/ptx.cuh"
#include "gemm/hopper/shape.cuh"

namespace anabranch::hopper {

/// Walks over the tiles of this cluster: the same ones, in the same order, for all of its warps. A unit
/// is what a cluster takes at once: two tiles that share a or b. Cluster c takes units c, c + clusters, ...
template <typename shape>
class TileScheduler {
 public:
  __device__ TileScheduler(const Problem& problem, const int* first_unit)
      : problem_(problem),
        first_unit_(first_unit),
        unit_(blockIdx.x / kClusterSize),
        rank_(cluster_rank()) {}

  __device__ static int units_of(const Problem& problem, const Group& group) {
    return row_units(problem, group) * column_units(problem);
  }

  __device__ bool next(Tile& tile) {
    if (unit_ >= first_unit_[problem_.groups]) {
      return false;
    }
    while (unit_ >= first_unit_[group_ + 1]) {
      ++group_;
    }
    const Group& group = problem_.group[group_];
    const int columns = column_units(problem_);
    const int rows = row_units(problem_, group);
    // Bands of rows, column by column: what is in flight together shares rows and columns.
    const int within = unit_ - first_unit_[group_];
    const int band = within / (problem_.band * columns);
    const int height = min(problem_.band, rows - band * problem_.band);
    const int in_band = within - band * problem_.band * columns;
    int row = band * problem_.band + in_band % height;
    int column = in_band / height;
    if constexpr (shape::kShare == Share::kB) {
      row = 2 * row + rank_;
    } else if constexpr (shape::kShare == Share::kA) {
      column = 2 * column + rank_;
    }
    const int k = shape::kRaggedK ? group.rows : problem_.k;
    tile = {group_, row * shape::kRows, column * shape::kTileColumns, (k + kBox - 1) / kBox};
    unit_ += gridDim.x / kClusterSize;
    return true;
  }

 private:
  static constexpr int kUnitRows = shape::kRows * (shape::kShare == Share::kB ? 2 : 1);
  static constexpr int kUnitColumns = shape::kTileColumns * (shape::kShare == Share::kA ? 2 : 1);

  __device__ static int row_units(const Problem& problem, const Group& group) {
    return ((shape::kRaggedK ? problem.m : group.rows) + kUnitRows - 1) / kUnitRows;
  }
  __device__ static int column_units(const Problem& problem) {
    return (problem.n + kUnitColumns - 1) / kUnitColumns;
  }

  const Problem& problem_;
  const int* first_unit_;
  int unit_;
  int rank_;
  int group_ = 0;
};

/// The first unit of each group, and the number of all. By one warp.
template <typename shape>
__device__ void count_units(const Problem& problem, int* first_unit) {
  const int lane = threadIdx.x % 32;
  int before = 0;
  for (int base = 0; base <= problem.groups; base += 32) {
    const int g = base + lane;
    const int units =
        g < problem.groups ? TileScheduler<shape>::units_of(problem, problem.group[g]) : 0;
    int sum = units;
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_up_sync(0xFFFFFFFF, sum, distance);
      sum += lane >= distance ? other : 0;
    }
    if (g <= problem.groups) {
      first_unit[g] = before + sum - units;
    }
    before += __shfl_sync(0xFFFFFFFF, sum, 31);
  }
}

}  // namespace anabranch::hopper
