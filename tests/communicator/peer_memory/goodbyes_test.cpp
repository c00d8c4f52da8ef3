#include "communicator/peer_memory/goodbyes.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>

#include "support/world.h"

namespace anabranch::test {
namespace {

TEST(Goodbyes, AreCompleteWhenTheLastOfTheOthersHasLeft) {
  const int rank = world()->rank();
  const int size = world()->size();
  const Goodbyes goodbyes(*world());
  for (int leaver = 0; leaver < size; ++leaver) {
    const int others_left = rank < leaver ? leaver - 1 : leaver;
    EXPECT_EQ(goodbyes.all_have_left(), others_left == size - 1) << leaver;
    world()->barrier();
    if (rank == leaver) goodbyes.leave();
    world()->barrier();
  }
  EXPECT_TRUE(goodbyes.all_have_left());
  // Unmapped by one rank after another, of one owner after another.
  for (int owner = 0; owner < size; ++owner) {
    for (int other = 0; other < size; ++other) {
      EXPECT_EQ(
          goodbyes.all_have_unmapped(),
          owner > rank || size == 1 || (owner == rank && other == size - 1 && rank == size - 1))
          << owner << ' ' << other;
      world()->barrier();
      if (rank == other && rank != owner) goodbyes.unmap(owner);
      world()->barrier();
    }
  }
  EXPECT_TRUE(goodbyes.all_have_unmapped());
}

TEST(Goodbyes, OfTwoGroupsAreApartAndLeaveNoFileBehind) {
  const Goodbyes first(*world());
  const Goodbyes second(*world());
  first.leave();
  world()->barrier();
  EXPECT_TRUE(first.all_have_left());
  EXPECT_EQ(second.all_have_left(), world()->size() == 1);
  for (const auto& file : std::filesystem::directory_iterator("/dev/shm")) {
    EXPECT_EQ(file.path().filename().string().find("anabranch-" + std::to_string(getpid())),
              std::string::npos)
        << file.path();
  }
}

}  // namespace
}  // namespace anabranch::test
