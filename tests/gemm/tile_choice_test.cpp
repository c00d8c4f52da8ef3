// Which tiles the kernel for compute capability 9.0 takes, on any machine.
#include "gemm/hopper/tile_choice.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <ostream>
#include <vector>

#include "gemm/tiles/unit_order.h"
#include "support/random.h"
#include "support/world.h"

namespace anabranch::hopper {

static void PrintTo(Tiling tiling, std::ostream* out) {
  constexpr const char* kNames[] = {"pingpong", "pingpong sharing b", "cooperative",
                                    "cooperative alone"};
  *out << kNames[static_cast<int>(tiling)];
}

}  // namespace anabranch::hopper

namespace anabranch::test {
namespace {

using namespace hopper;

constexpr Task kPlain[] = {{Operation::kForward, Element::kBfloat16},
                           {Operation::kDgrad, Element::kBfloat16},
                           {Operation::kWgrad, Element::kBfloat16},
                           {Operation::kWgrad, Element::kHalf, Epilogue::kAccumulate}};
/// The wide tiles of a product without activation, whose experts have fewer than 12,800 rows on average.
Tiling wide(const Task& task) {
  return task.operation == Operation::kWgrad ? Tiling::kCooperative : Tiling::kCooperativeAlone;
}

constexpr Task kForwardWithGlu = {Operation::kForward, Element::kBfloat16, Epilogue::kActivate,
                                  /*glu=*/true};
constexpr Task kDgradWithGlu = {Operation::kDgrad, Element::kBfloat16, Epilogue::kActivateBackward,
                                /*glu=*/true};

// What a launch of the models' shapes takes: 8 experts of Mixtral with 2048 rows each, 128 of Qwen3
// with 2048, 64 small ones with 128.
TEST(TileChoiceTest, OfKnownShapes) {
  for (const Task& task : kPlain) {
    EXPECT_EQ(choose_tiling(task, {8, 16384, 28672, 4096}), wide(task));
    EXPECT_EQ(choose_tiling(task, {128, 262144, 1536, 2048}), wide(task));
    EXPECT_EQ(choose_tiling(task, {64, 8192, 1024, 1024}), Tiling::kPingpong);
  }
  EXPECT_EQ(choose_tiling(kForwardWithGlu, {8, 16384, 14336, 4096}), Tiling::kCooperative);
  EXPECT_EQ(choose_tiling(kForwardWithGlu, {64, 8192, 512, 1024}), Tiling::kPingpong);
  // Backward's epilogue takes long, and wide tiles have nothing to hide it behind.
  EXPECT_EQ(choose_tiling(kDgradWithGlu, {8, 16384, 14336, 4096}), Tiling::kCooperative);
  EXPECT_EQ(choose_tiling(kDgradWithGlu, {128, 262144, 768, 2048}), Tiling::kPingpong);
}

TEST(TileChoiceTest, WideTilesWantManyRowsOrLongSums) {
  for (const Task& task : kPlain) {
    EXPECT_EQ(choose_tiling(task, {4, 4 * 512, 512, 1024}), wide(task));
    EXPECT_EQ(choose_tiling(task, {4, 4 * 512 - 1, 512, 1024}), Tiling::kPingpong);
    EXPECT_EQ(choose_tiling(task, {4, 4, 512, 4096}), wide(task));
    EXPECT_EQ(choose_tiling(task, {4, 4, 512, 4095}), Tiling::kPingpong);
  }
}

// An odd column of tiles is half a wide tile wasted, or a CTA without a neighbour: of many it is little.
TEST(TileChoiceTest, AnOddNumberOfColumns) {
  for (const Task& task : kPlain) {
    EXPECT_EQ(choose_tiling(task, {1, 4096, 13 * 128, 1024}), Tiling::kPingpongSharingB);
    EXPECT_EQ(choose_tiling(task, {1, 4096, 14 * 128, 1024}), wide(task));
    EXPECT_EQ(choose_tiling(task, {1, 4096, 15 * 128, 1024}), wide(task));
    EXPECT_EQ(choose_tiling(task, {1, 4096, 12 * 128 + 1, 1024}), Tiling::kPingpongSharingB);
  }
  // A tile of a gate and its up part is half as wide.
  EXPECT_EQ(choose_tiling(kForwardWithGlu, {1, 4096, 13 * 64, 1024}), Tiling::kPingpong);
  EXPECT_EQ(choose_tiling(kForwardWithGlu, {1, 4096, 13 * 128, 1024}), Tiling::kCooperative);
}

// The kernels with an activation share a where they do not cooperate: there is no third of them.
TEST(TileChoiceTest, IsOneThatThereIsAKernelFor) {
  test::Random random(test_seed());
  for (int64_t i = 0; i < effort(2000); ++i) {
    const LaunchSizes sizes = {random.integer(1, 256), random.integer(1, 1 << 18),
                               random.integer(1, 1 << 14), random.integer(0, 1 << 14)};
    for (Task task : {kForwardWithGlu, kDgradWithGlu}) {
      task.glu = random.chance(0.5);
      EXPECT_NE(choose_tiling(task, sizes), Tiling::kPingpongSharingB);
      EXPECT_NE(choose_tiling(task, sizes), Tiling::kCooperativeAlone);
    }
    for (const Task& task : kPlain) {
      if (task.operation == Operation::kWgrad) {
        EXPECT_NE(choose_tiling(task, sizes), Tiling::kCooperativeAlone);
      }
    }
  }
}

// A pair of tiles wastes half a tile more of an expert's rows, on average: of very many that is little, and what
// a pair shares is left.
TEST(TileChoiceTest, PairsWhereTheirRoundingIsATrifle) {
  for (const int64_t experts : {1, 8, 128}) {
    for (const auto operation : {Operation::kForward, Operation::kDgrad}) {
      const Task task = {operation, Element::kHalf};
      EXPECT_EQ(choose_tiling(task, {experts, experts * 12800, 2048, 512}),
                Tiling::kCooperativeAlone);
      EXPECT_EQ(choose_tiling(task, {experts, experts * 12800 + 1, 2048, 512}),
                Tiling::kCooperative);
    }
  }
}

TEST(UnitOrderTest, EveryUnitIsTakenOnceAndInAscendingOrder) {
  test::Random random(test_seed());
  for (int64_t i = 0; i < effort(200); ++i) {
    const auto clusters = static_cast<int>(random.integer(1, 132));
    const auto units = static_cast<int>(random.integer(0, 2000));
    for (const bool falling : {false, true}) {
      std::vector<int> taken(units, 0);
      for (int cluster = 0; cluster < clusters; ++cluster) {
        int last = -1;
        for (UnitOrder order(cluster, clusters, falling); order.unit() < units; order.advance()) {
          EXPECT_GT(order.unit(), last);
          last = order.unit();
          ++taken[last];
        }
      }
      EXPECT_EQ(std::count(taken.begin(), taken.end(), 1), units)
          << clusters << " clusters, " << units << " units";
    }
  }
}

/// The rows that the busiest of 66 clusters sums over, beside the mean: experts with rows by Zipf's law, each of
/// so many units.
double busiest(int experts, int units_of_expert, double skew, bool falling) {
  constexpr int kClusters = 66;
  std::vector<double> units;
  for (int expert = 1; expert <= experts; ++expert) {
    units.insert(units.end(), units_of_expert, std::pow(expert, -skew));
  }
  std::vector<double> load(kClusters, 0);
  for (int cluster = 0; cluster < kClusters; ++cluster) {
    UnitOrder order(cluster, kClusters, falling);
    for (; order.unit() < static_cast<int>(units.size()); order.advance()) {
      load[cluster] += units[order.unit()];
    }
  }
  return *std::max_element(load.begin(), load.end()) * kClusters /
         std::accumulate(units.begin(), units.end(), 0.0);
}

TEST(UnitOrderTest, UnequalUnitsAreSharedMoreEvenly) {
  for (const auto& [experts, units] : {std::pair{128, 24}, {64, 32}, {128, 12}, {64, 16}}) {
    EXPECT_LT(busiest(experts, units, 0.8, true), busiest(experts, units, 0.8, false) - 0.05);
    EXPECT_DOUBLE_EQ(busiest(experts, 66, 0, true), 1);
  }
}

TEST(TileChoiceTest, BandsAreFewWhereAWeightLeavesTheCache) {
  for (const auto operation : {Operation::kForward, Operation::kDgrad}) {
    EXPECT_EQ(choose_band(operation, 2048, 1536), 8);
    EXPECT_EQ(choose_band(operation, 28672, 4096), 32);
  }
  EXPECT_EQ(choose_band(Operation::kWgrad, 28672, 4096), 8);
}

}  // namespace
}  // namespace anabranch::test
