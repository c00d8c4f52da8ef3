#include <anabranch/communicator.h>
#include <gtest/gtest.h>

#include <thread>

#include "support/devices.h"
#include "support/random.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

int64_t sum_of(Communicator& communicator, int64_t value) {
  auto tensor = on_device(torch::full({3}, value, torch::kInt64));
  communicator.all_reduce(tensor);
  EXPECT_TRUE(tensor.eq(tensor[0]).all().item<bool>());
  return tensor[0].item<int64_t>();
}

TEST(Split, GroupsByColorAndOrdersByKey) {
  const int rank = world()->rank();
  const int size = world()->size();
  const int color = rank % 2;
  const auto group = world()->split(color, -rank);  // the highest rank first

  const int members = (size + 1 - color) / 2;
  ASSERT_EQ(group->size(), members);
  EXPECT_EQ(group->rank(), members - 1 - rank / 2);
  EXPECT_EQ(group->name(), world()->name());

  const auto ranks = group->all_gather(on_device(torch::tensor(rank)));
  for (int i = 0; i < members; ++i) {
    EXPECT_EQ(ranks[i].item<int>(), color + 2 * (members - 1 - i));
  }
}

TEST(Split, OrdersEqualKeysByRank) {
  const auto group = world()->split(-7, 3);
  EXPECT_EQ(group->rank(), world()->rank());
  EXPECT_EQ(group->size(), world()->size());
}

TEST(Split, MovesRowsWithinEachGroup) {
  const auto group = world()->split(world()->rank() / 2, world()->rank());
  const std::vector<int64_t> rows(group->size(), 1);
  const auto send = on_device(torch::full({group->size(), 4}, world()->rank(), torch::kFloat32));
  const auto receive = torch::full_like(send, -1.0F);
  group->all_to_all_v({{send, rows, receive, rows}});
  for (int peer = 0; peer < group->size(); ++peer) {
    EXPECT_TRUE(receive[peer].eq(world()->rank() / 2 * 2 + peer).all().item<bool>());
  }
  auto token = on_device(torch::full({1}, world()->rank(), torch::kFloat32));
  group->broadcast(token, group->size() - 1);
  EXPECT_EQ(token.item<float>(), std::min(world()->rank() / 2 * 2 + 1, world()->size() - 1));
  group->barrier();
}

TEST(Split, GroupsOfGroupsOverlapWithoutMixingMessages) {
  Random random(test_seed());
  std::vector<std::shared_ptr<Communicator>> groups = {world()};
  std::vector<int64_t> sums = {sum_of(*world(), world()->rank())};
  for (int i = 0; i < 12; ++i) {
    // Only groups that every rank has made in the same order are split further.
    const auto parent = groups[static_cast<size_t>(random.integer(0, i))];
    const auto colors = random.permutation(4);
    groups.push_back(
        parent->split(static_cast<int>(colors[world()->rank() % 4].item<int64_t>() / 2), 0));
    sums.push_back(sum_of(*groups.back(), world()->rank()));
  }
  for (int i = 0; i < 100; ++i) {
    const auto pick = static_cast<size_t>(random.integer(0, 12));
    EXPECT_EQ(sum_of(*groups[pick], world()->rank()), sums[pick]);
  }
}

TEST(Split, GroupsOutliveTheirParent) {
  auto parent = world()->split(0, 0);
  const auto child = parent->split(0, 0);
  parent.reset();
  EXPECT_EQ(sum_of(*child, 1), world()->size());
}

TEST(Split, TwoThreadsUseTwoGroupsAtOnce) {
  if (world()->name() == "nccl" || (world()->name() == "process_group" && device().is_cuda())) {
    GTEST_SKIP() << "on one stream, two of NCCL's groups must be used in the same order everywhere";
  }
  if (world()->name() == "store") {
    GTEST_SKIP() << "a store answers one thread at a time";
  }
  const auto left = world()->split(0, world()->rank());
  const auto right = world()->split(0, -world()->rank());
  const auto work = [](const std::shared_ptr<Communicator>& communicator, int64_t value) {
    for (int i = 0; i < 200; ++i) {
      ASSERT_EQ(sum_of(*communicator, value + i), communicator->size() * (value + i));
    }
  };
  std::thread other(work, right, 1'000'000);
  work(left, 0);
  other.join();
}

}  // namespace
}  // namespace anabranch::test
