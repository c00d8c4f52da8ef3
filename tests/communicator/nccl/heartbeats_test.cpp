// Who is missing, as the ranks find out beside NCCL: by datagrams, without a GPU.
#include "communicator/nccl/heartbeats.h"

#include <gtest/gtest.h>

#include <thread>

#include "support/collectives.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

using std::chrono::milliseconds;

/// Says for so long that this rank lives and has begun its `started`th collective.
void live_on(NcclHeartbeats& heartbeats, int64_t started, milliseconds time) {
  const auto end = std::chrono::steady_clock::now() + time;
  while (std::chrono::steady_clock::now() < end) {
    heartbeats.publish(started);
    std::this_thread::sleep_for(milliseconds(5));
  }
}

class HeartbeatsTest : public ::testing::Test {
 protected:
  static constexpr milliseconds kHeartbeat{100};

  /// What rank 0 finds missing at the 7th collective, while rank 1 is at `first` and the last rank at
  /// `last`, or says nothing.
  std::vector<int> found_missing(int64_t first, std::optional<int64_t> last) {
    NcclHeartbeats heartbeats(*world_);
    std::vector<int> missing;
    if (world_->rank() == 0) {
      missing = heartbeats.missing(7, kHeartbeat);
    } else if (world_->rank() < world_->size() - 1) {
      live_on(heartbeats, first, 5 * kHeartbeat);
    } else if (last.has_value()) {
      live_on(heartbeats, *last, 5 * kHeartbeat);
    }
    world_->barrier();
    return missing;
  }

  std::shared_ptr<Communicator> world_ = world();
};

TEST_F(HeartbeatsTest, ASilentRankIsMissing) {
  ANABRANCH_NEEDS_RANKS(2);
  const auto missing = found_missing(7, std::nullopt);
  if (world_->rank() == 0) {
    EXPECT_EQ(missing, std::vector<int>{world_->size() - 1});
  }
}

// It may be waiting for the silent one, as this rank does.
TEST_F(HeartbeatsTest, ARankThatIsBehindIsNotMissingBesideASilentOne) {
  ANABRANCH_NEEDS_RANKS(3);
  const auto missing = found_missing(6, std::nullopt);
  if (world_->rank() == 0) {
    EXPECT_EQ(missing, std::vector<int>{world_->size() - 1});
  }
}

TEST_F(HeartbeatsTest, ALivingRankThatIsBehindIsMissingWhereNobodyIsSilent) {
  ANABRANCH_NEEDS_RANKS(2);
  const auto missing = found_missing(7, 6);
  if (world_->rank() == 0) {
    EXPECT_EQ(missing, std::vector<int>{world_->size() - 1});
  }
}

TEST_F(HeartbeatsTest, WhereAllHaveComeNobodyIsMissing) {
  ANABRANCH_NEEDS_RANKS(2);
  const auto missing = found_missing(7, 8);
  if (world_->rank() == 0) {
    EXPECT_TRUE(missing.empty());
  }
}

TEST_F(HeartbeatsTest, AnAnnouncedFailureReachesAll) {
  ANABRANCH_NEEDS_RANKS(2);
  NcclHeartbeats heartbeats(*world_);
  world_->barrier();
  if (world_->rank() == 0) {
    heartbeats.announce({"rank 0: no more", {1}});
  }
  world_->barrier();
  if (world_->rank() != 0) {
    for (int i = 0; i < 400 && !heartbeats.announced().has_value(); ++i) {
      heartbeats.listen();
      std::this_thread::sleep_for(milliseconds(5));
    }
    ASSERT_TRUE(heartbeats.announced().has_value());
    EXPECT_EQ(heartbeats.announced()->text, "rank 0: no more");
    EXPECT_EQ(heartbeats.announced()->culprits, std::vector<int>{1});
  }
  world_->barrier();
}

}  // namespace
}  // namespace anabranch::test
