// What is a process group's own; what it moves, communicator_test says.
#include <anabranch/process_group.h>
#include <gtest/gtest.h>

#include <thread>

#include "support/devices.h"
#include "support/process_group.h"
#include "support/thrown.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

constexpr auto kLong = std::chrono::seconds(60);

TEST(ProcessGroup, IsSharedWithOthers) {
  const auto group = make_process_group(*world(), kLong);
  const auto first = make_process_group_communicator(group);
  const auto second = make_process_group_communicator(group);
  EXPECT_EQ(first->name(), "process_group");
  for (int i = 0; i < 10; ++i) {
    auto sum = on_device(torch::ones({7}));
    std::vector<torch::Tensor> own = {torch::ones({3})};
    const auto work = group->allreduce(own);
    (i % 2 == 0 ? first : second)->all_reduce(sum);
    work->wait();
    EXPECT_TRUE(sum.eq(world()->size()).all().item<bool>());
    EXPECT_TRUE(own[0].eq(world()->size()).all().item<bool>());
  }
}

TEST(ProcessGroup, NamesTheRankThatDoesNotCome) {
  ANABRANCH_NEEDS_RANKS(2);
  const int culprit = world()->size() - 1;
  const auto communicator = make_process_group_communicator(make_process_group(*world(), kLong),
                                                            {std::chrono::milliseconds(500)});
  if (world()->rank() != culprit) {
    auto sum = torch::ones({100});
    const auto thrown = thrown_by([&] { communicator->all_reduce(sum); });
    EXPECT_EQ(thrown.kind, Thrown::Kind::kCommunication) << thrown;
    EXPECT_TRUE(thrown.says("all_reduce waited up to 0.5 s")) << thrown;
    EXPECT_EQ(thrown.peers, std::vector<int>{culprit}) << thrown;
  }
  world()->barrier();
}

TEST(ProcessGroup, NamesTheRankThatIsGone) {
  ANABRANCH_NEEDS_RANKS(2);
  const int culprit = world()->size() - 1;
  auto communicator = make_process_group_communicator(make_process_group(*world(), kLong), {kLong});
  communicator->barrier();
  if (world()->rank() == culprit) {
    communicator.reset();
  } else {
    // Who comes when it is long gone owes the others their messages all the same.
    if (world()->rank() == 1) std::this_thread::sleep_for(std::chrono::milliseconds(300));
    const auto thrown = thrown_by([&] { communicator->barrier(); });
    EXPECT_EQ(thrown.kind, Thrown::Kind::kCommunication) << thrown;
    EXPECT_EQ(thrown.peers, std::vector<int>{culprit}) << thrown;
  }
  world()->barrier();
}

TEST(ProcessGroup, RefusesWrongArguments) {
  EXPECT_INPUT_ERROR(make_process_group_communicator({}), "no process group");
  const auto without_backend = c10::make_intrusive<c10d::ProcessGroup>(0, 1);
  EXPECT_INPUT_ERROR(make_process_group_communicator(without_backend),
                     "has no backend for the CPU, and none for CUDA");
  EXPECT_INPUT_ERROR(
      make_process_group_communicator(without_backend, {std::chrono::milliseconds(0)}),
      "deadline is 0 ms");
}

}  // namespace
}  // namespace anabranch::test
