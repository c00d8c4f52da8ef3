// What groups that were split from one another know of each other's failures.
#include "communicator/nccl/family.h"

#include <gtest/gtest.h>

namespace anabranch::test {
namespace {

TEST(NcclFamily, AFailureOfOneGroupIsThatOfAll) {
  const NcclFamily world(6);
  const NcclFamily odd = world.split({5, 3, 1});
  const NcclFamily pair = odd.split({2, 0});  // ranks 1 and 5 of the world
  const NcclFamily even = world.split({0, 2, 4});
  EXPECT_FALSE(world.failure().has_value());
  odd.report({"no sign of rank 1, 2", {1, 2}});  // ranks 3 and 1 of the world
  const auto expect = [](const NcclFamily& group, const std::vector<int>& culprits) {
    const auto failure = group.failure();
    ASSERT_TRUE(failure.has_value());
    EXPECT_EQ(failure->text, "no sign of rank 1, 2");
    EXPECT_EQ(failure->culprits, culprits);
  };
  expect(world, {3, 1});
  expect(odd, {1, 2});
  expect(pair, {0});  // rank 3 is none of it
  expect(even, {});
}

TEST(NcclFamily, TheFirstFailureStays) {
  const NcclFamily world(3);
  world.report({"first", {2}});
  world.split({2, 1, 0}).report({"second", {2}});
  EXPECT_EQ(world.failure()->text, "first");
  EXPECT_EQ(world.failure()->culprits, std::vector<int>{2});
  EXPECT_FALSE(NcclFamily(3).failure().has_value());  // another family
}

}  // namespace
}  // namespace anabranch::test
