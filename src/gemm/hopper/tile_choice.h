#pragma once

#include <cstdint>

#include "gemm/tiles/task.h"

// Which of the kernel's tiles a launch takes: plain C++, to be read and tested without a GPU.

namespace anabranch::hopper {

using namespace tiles;

/// The products c [m, n] = a [m, k] · b [k, n] of one launch; m or k are an expert's rows.
struct LaunchSizes {
  int64_t experts;
  int64_t rows;  ///< of all experts together
  int64_t n;     ///< with GLU, of the activation
  int64_t k;     ///< 0 where it is the rows
};

/// How the two warpgroups that multiply share the work, and the two CTAs of a cluster what they load.
enum class Tiling {
  /// Tiles of 128 × 128, one a warpgroup: one's epilogue runs in the shadow of the other's products.
  /// CTAs beside one another load each half of the same a.
  kPingpong,
  /// The same; CTAs above one another load each half of the same b. For an odd number of columns of
  /// tiles, one of which would have no neighbour.
  kPingpongSharingB,
  /// Tiles of 128 × 256, both warpgroups on one: fewest bytes into shared memory, and so least power,
  /// which is what bounds a chip that multiplies for long. CTAs above one another share b.
  kCooperative,
  /// The same tiles, each CTA alone: an expert's rows are rounded up to 128 and not to 256. Of plain
  /// products (kStore, forward and dgrad).
  kCooperativeAlone,
};

Tiling choose_tiling(const Task& task, const LaunchSizes& sizes);

/// Tiles above one another that are in flight together, see TileScheduler.
int32_t choose_band(Operation operation, int64_t n, int64_t k);

}  // namespace anabranch::hopper
