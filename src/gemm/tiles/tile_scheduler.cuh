#pragma once

// A persistent kernel's tile scheduler: which tile of which expert a cluster multiplies next.
#include "gemm/tiles/problem.h"
#include "gemm/tiles/unit_order.h"

namespace anabranch::tiles {

/// Elements of the sum in a step.
constexpr int kDepth = 64;

/// What the two CTAs of a cluster have in common: tiles above one another read the same b, tiles
/// beside one another the same a. Each CTA loads one half for both. With nothing to share a CTA is a
/// cluster by itself.
enum class Share { kNone, kA, kB };

/// Places in shared memory for the numbers of experts' first tiles; of more experts several share one.
constexpr int kMostSlots = 256;

/// The experts in the order in which they are multiplied, and how many units each is. A unit is what a
/// cluster takes at once: two tiles that share a or b, or one tile.
template <typename shape>
class ExpertUnits {
 public:
  __device__ explicit ExpertUnits(const Problem& problem)
      : problem_(problem), columns_((problem.n + kUnitColumns - 1) / kUnitColumns) {}

  /// Of sums over rows the longest come first: short ones then fill the gaps at the end.
  __device__ Group expert(int place) const {
    const int expert = shape::kRaggedK ? static_cast<int>(problem_.longest_first[place]) : place;
    const int first_row = static_cast<int>(problem_.first_row[expert]);
    return {expert, first_row, static_cast<int>(problem_.first_row[expert + 1]) - first_row};
  }
  __device__ int columns() const { return columns_; }
  __device__ int rows(const Group& group) const {
    return ((shape::kRaggedK ? problem_.m : group.rows) + kUnitRows - 1) / kUnitRows;
  }
  __device__ int units(const Group& group) const { return rows(group) * columns_; }

  /// Neighbouring experts share a slot where there are many.
  __device__ int experts_of_slot() const {
    return (problem_.experts + kMostSlots - 1) / kMostSlots;
  }
  __device__ int slots() const {
    return (problem_.experts + experts_of_slot() - 1) / experts_of_slot();
  }

 private:
  static constexpr int kUnitRows = shape::kRows * (shape::kShare == Share::kB ? 2 : 1);
  static constexpr int kUnitColumns = shape::kTileColumns * (shape::kShare == Share::kA ? 2 : 1);

  const Problem& problem_;
  int columns_;
};

/// Walks over the tiles of this cluster: the same ones, in the same order, for all of its warps.
template <typename shape>
class TileScheduler {
 public:
  /// `first_unit`: see count_units. `rank` of this CTA in its cluster.
  __device__ TileScheduler(const Problem& problem, const int* first_unit, int rank)
      : problem_(problem),
        all_(problem),
        first_unit_(first_unit),
        end_(first_unit[all_.slots()]),
        order_(blockIdx.x / shape::kClusterSize, gridDim.x / shape::kClusterSize, shape::kRaggedK),
        rank_(rank) {}

  __device__ bool next(Tile& tile) {
    const int unit = order_.unit();
    if (unit >= end_) {
      return false;
    }
    while (unit >= first_unit_[slot_ + 1]) {
      ++slot_;
    }
    int within = unit - first_unit_[slot_];
    int place = slot_ * all_.experts_of_slot();
    Group group = all_.expert(place);
    for (int units; within >= (units = all_.units(group)); within -= units) {
      group = all_.expert(++place);
    }
    // Bands of rows, column by column: what is in flight together shares rows and columns.
    const int band = within / (problem_.band * all_.columns());
    const int height = min(problem_.band, all_.rows(group) - band * problem_.band);
    const int in_band = within - band * problem_.band * all_.columns();
    int row = band * problem_.band + in_band % height;
    int column = in_band / height;
    if constexpr (shape::kShare == Share::kB) {
      row = 2 * row + rank_;
    } else if constexpr (shape::kShare == Share::kA) {
      column = 2 * column + rank_;
    }
    const int k = shape::kRaggedK ? group.rows : problem_.k;
    tile = {group, row * shape::kRows, column * shape::kTileColumns, (k + kDepth - 1) / kDepth};
    order_.advance();
    return true;
  }

 private:
  const Problem& problem_;
  ExpertUnits<shape> all_;
  const int* first_unit_;
  int end_;
  UnitOrder order_;
  int rank_;
  int slot_ = 0;
};

/// The first unit of each slot, and the number of all. By one warp.
template <typename shape>
__device__ void count_units(const Problem& problem, int* first_unit) {
  const ExpertUnits<shape> all(problem);
  const int experts_of_slot = all.experts_of_slot();
  const int slots = all.slots();
  const int lane = threadIdx.x % 32;
  int before = 0;
  for (int base = 0; base <= slots; base += 32) {
    const int slot = base + lane;
    const int last = min((slot + 1) * experts_of_slot, problem.experts);
    int units = 0;
    for (int place = slot * experts_of_slot; place < last; ++place) {
      units += all.units(all.expert(place));
    }
    int sum = units;
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_up_sync(0xFFFFFFFF, sum, distance);
      sum += lane >= distance ? other : 0;
    }
    if (slot <= slots) {
      first_unit[slot] = before + sum - units;
    }
    before += __shfl_sync(0xFFFFFFFF, sum, 31);
  }
}

}  // namespace anabranch::tiles
