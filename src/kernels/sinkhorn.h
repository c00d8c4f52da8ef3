#pragma once

#include <cstdint>

namespace anabranch {

// See RoutingKernels::sinkhorn_bias.

/// Rounds at most: nobody waits for a GPU to learn how many it took.
constexpr int64_t kSinkhornRounds = 10;
/// They end where each expert's sum is as near as this to their mean, in parts of it.
constexpr double kSinkhornTolerance = 1e-3;
/// An expert's smaller sums count as this, so that none is infinitely far from the mean.
constexpr double kLeastSinkhornSum = 1e-9;

}  // namespace anabranch
