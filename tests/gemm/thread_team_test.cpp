#include "support/thread_team.h"

#include <gtest/gtest.h>

#include <chrono>

#include "support/random.h"
#include "support/thrown.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

TEST(ThreadTeamTest, EveryPartRunsOnceAndHasEndedOnReturn) {
  Random random{test_seed()};
  std::atomic<int> begun = 0;
  ThreadTeam team(7, [&] { ++begun; });
  for (int call = 0; call < 300; ++call) {
    const int parts = static_cast<int>(random.integer(1, 8));
    std::vector<int> runs(8);  // not atomic: each belongs to one part
    std::vector<std::thread::id> threads(8);
    team.run(parts, [&](int part) {
      ++runs[part];
      threads[part] = std::this_thread::get_id();
    });
    for (int part = 0; part < 8; ++part) {
      EXPECT_EQ(runs[part], part < parts) << "part " << part << " of " << parts;
    }
    EXPECT_EQ(threads[0], std::this_thread::get_id());
    // Long enough now and then for the threads to have gone to sleep.
    if (random.chance(0.1)) std::this_thread::sleep_for(std::chrono::milliseconds(3));
  }
  EXPECT_LE(begun, 7);
  EXPECT_GE(begun, 1);
}

TEST(ThreadTeamTest, ManyJobsInARow) {
  constexpr int kJobs = 20000;
  ThreadTeam team(3, [] {});
  std::vector<int> runs(4);
  for (int job = 0; job < kJobs; ++job) {
    team.run(4, [&](int part) { ++runs[part]; });
  }
  EXPECT_EQ(runs, std::vector<int>(4, kJobs));
}

TEST(ThreadTeamTest, OfNobodyRunsItsOnePart) {
  ThreadTeam team(0, [] {});
  int runs = 0;
  team.run(1, [&](int part) { runs += 1 + part; });
  EXPECT_EQ(runs, 1);
}

TEST(ThreadTeamTest, EndsAsleepOrUnused) {
  ThreadTeam unused(5, [] {});
  ThreadTeam asleep(5, [] {});
  asleep.run(6, [](int) {});
  std::this_thread::sleep_for(std::chrono::milliseconds(5));
}

TEST(ThreadTeamTest, RefusesMorePartsThanThreads) {
  ThreadTeam team(2, [] {});
  EXPECT_TRUE(thrown_by([&] { team.run(4, [](int) {}); }).says("2 threads does not do 4 parts"));
  EXPECT_TRUE(thrown_by([&] { team.run(0, [](int) {}); }).says("0 parts"));
  EXPECT_TRUE(thrown_by([] { ThreadTeam(-1, [] {}); }).says("-1"));
}

}  // namespace
}  // namespace anabranch::test
