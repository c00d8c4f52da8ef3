#pragma once

// How a tile is cut and laid out: what all parts of the kernel agree on at compile time.
#include "gemm/hopper/maps.h"
#include "gemm/tiles/task.h"
#include "gemm/tiles/tile_scheduler.cuh"

namespace anabranch::hopper {

constexpr int kBox = 64;  // rows and elements of a box
constexpr int kBoxBytes = kBox * kBox * 2;
static_assert(kBox == kDepth && kBox == kDotColumns);
constexpr int kWarpgroup = 128;           // threads
constexpr int kThreads = 3 * kWarpgroup;  // a producer warpgroup loads, two consumers multiply

/// kRowBoxes · 64 rows and kColumns columns of the products for each consumer warpgroup.
/// `kPingpong`: each has tiles of its own, one's epilogue in the shadow of the other's products;
/// otherwise they are cooperative, and lie above one another in one tile.
template <Operation kOperation_, int kRowBoxes_, int kColumns_, bool kPingpong_, int kStages_,
          int kStagingBoxes_, Share kShare_, Epilogue kEpilogue_ = Epilogue::kStore,
          bool kGlu_ = false, Gathered kGathered_ = Gathered::kNone>
struct Shape {
  static constexpr Operation kOperation = kOperation_;
  static constexpr int kRowBoxes = kRowBoxes_;
  static constexpr int kColumns = kColumns_;
  static constexpr bool kPingpong = kPingpong_;
  static constexpr int kStages = kStages_;
  static constexpr int kStagingBoxes = kStagingBoxes_;
  static constexpr Share kShare = kShare_;
  static constexpr Epilogue kEpilogue = kEpilogue_;
  static constexpr bool kGlu = kGlu_;
  static constexpr Gathered kGathered = kGathered_;
  static constexpr bool kGathers = kGathered != Gathered::kNone;
  static_assert(kGathered != Gathered::kA || kShare != Share::kA);
  static_assert(kGathered != Gathered::kB || kShare != Share::kB);

  static constexpr int kClusterSize = kShare == Share::kNone ? 1 : 2;
  static constexpr bool kTransposedA = kOperation == Operation::kWgrad;
  static constexpr bool kTransposedB = kOperation != Operation::kForward;
  static constexpr bool kRaggedK = kOperation == Operation::kWgrad;
  /// The left half of a tile is gate, the right half the up part of the same columns.
  static constexpr bool kGateAndUp = kGlu && kEpilogue == Epilogue::kActivate;
  static constexpr int kABoxes = kRowBoxes * (kPingpong ? 1 : 2);
  static constexpr int kBBoxes = kColumns / kBox;
  static constexpr int kRows = kABoxes * kBox;
  static constexpr int kTileColumns = kGateAndUp ? kColumns / 2 : kColumns;
  static constexpr int kStageBytes = (kABoxes + kBBoxes) * kBoxBytes;
  /// Of a stage what TMA brings.
  static constexpr int kTmaBytes = kStageBytes - (kGathered == Gathered::kA   ? kABoxes
                                                  : kGathered == Gathered::kB ? kBBoxes
                                                                              : 0) *
                                                     kBoxBytes;
  /// Of a thread. Together those of all threads that a CTA begins with, 168 each: more would be waited for for ever.
  static constexpr int kProducerRegisters = !kGathers ? 40 : kRaggedK ? 72 : 56;
  static constexpr int kConsumerRegisters = (3 * 168 - kProducerRegisters) / 2;
  static constexpr int kBarriers = 2 * kStages + 2;
  static constexpr int kSharedBytes = 1024 + kStages * kStageBytes + 2 * kStagingBoxes * kBoxBytes +
                                      kBarriers * 8 + (kMostSlots + 1) * 4;
};

template <typename shape>
using Accumulators = float[shape::kRowBoxes][shape::kColumns / 2];

}  // namespace anabranch::hopper
