#include "gemm/hopper/tile_choice.h"

namespace anabranch::hopper {
namespace {

constexpr int64_t kLongSum = 4096;

/// Columns of pingpong's tiles; of a gate and its up part that are multiplied side by side, each half.
int64_t tile_columns(const Task& task) {
  return task.glu && task.epilogue == Epilogue::kActivate ? 64 : 128;
}

/// Whether tiles twice as wide as pingpong's would be full.
bool fills_wide_tiles(const Task& task, const LaunchSizes& sizes) {
  constexpr int64_t kManyRows = 512;    // of an expert
  constexpr int64_t kManyColumns = 15;  // of tiles: half a wide tile too many is little
  const int64_t columns = (sizes.n + tile_columns(task) - 1) / tile_columns(task);
  return (columns % 2 == 0 || columns >= kManyColumns) &&
         (sizes.rows >= kManyRows * sizes.experts || sizes.k >= kLongSum);
}

/// Whether what is saved by rounding an expert's rows up to one tile and not to a pair is more than a
/// trifle. How many rows each has, the host need not know: a rest is as likely to fill the upper half of
/// its pair alone as both, so on average half a tile of each expert is saved. Where all rests fill their
/// pairs, CTAs alone were found to be as fast.
bool saves_by_rounding(const LaunchSizes& sizes) {
  constexpr int64_t kSavedOfExpert = 64;
  constexpr int64_t kTrifle = 200;  // of so many rows one
  return sizes.experts * kSavedOfExpert * kTrifle >= sizes.rows;
}

}  // namespace

Tiling choose_tiling(const Task& task, const LaunchSizes& sizes) {
  // The epilogue of an activation's backward takes long: of a short sum it is better in the shadow of
  // products.
  const bool short_sum = task.epilogue == Epilogue::kActivateBackward && sizes.k < kLongSum;
  if (!short_sum && fills_wide_tiles(task, sizes)) {
    // The epilogues with an activation gain more by what a pair shares.
    const bool plain = task.operation != Operation::kWgrad && task.epilogue == Epilogue::kStore;
    return plain && saves_by_rounding(sizes) ? Tiling::kCooperativeAlone : Tiling::kCooperative;
  }
  const bool activates =
      task.epilogue == Epilogue::kActivate || task.epilogue == Epilogue::kActivateBackward;
  const bool even_columns = (sizes.n + 127) / 128 % 2 == 0;
  return activates || even_columns ? Tiling::kPingpong : Tiling::kPingpongSharingB;
}

/// Each band reads a whole weight: few bands where the weight does not stay in the cache.
int32_t choose_band(Operation operation, int64_t n, int64_t k) {
  constexpr int64_t kLargeWeight = int64_t{1} << 25;  // elements: 64 MiB
  return operation != Operation::kWgrad && n * k >= kLargeWeight ? 32 : 8;
}

}  // namespace anabranch::hopper
