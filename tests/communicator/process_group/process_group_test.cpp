// What is a process group's own; what it moves, communicator_test says.
#include <anabranch/process_group.h>
#include <gtest/gtest.h>

#include <stdexcept>
#include <thread>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include "communicator/process_group/coalescing.h"
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

TEST(ProcessGroup, LeavesTheProgramsOwnMessagesAlone) {
  ANABRANCH_NEEDS_RANKS(2);
  const auto group = make_process_group(*world(), kLong);
  const auto communicator = make_process_group_communicator(group, {kLong});
  for (const int tag : {0, 1, 7}) {
    std::vector<torch::Tensor> own = {torch::full({5}, 77 + tag, torch::kInt64)};
    c10::intrusive_ptr<c10d::Work> sending;
    if (world()->rank() == 0) {  // begun before the communicator's, and received behind them
      sending = group->send(own, 1, tag);
    }
    const auto gathered = communicator->all_gather(torch::full({5}, world()->rank()));
    for (int rank = 0; rank < world()->size(); ++rank) {
      EXPECT_TRUE(gathered[rank].eq(rank).all().item<bool>()) << tag;
    }
    if (world()->rank() == 1) {
      own[0].zero_();
      group->recv(own, 0, tag)->wait();
      EXPECT_TRUE(own[0].eq(77 + tag).all().item<bool>()) << tag;
    }
    if (sending) {
      sending->wait();
    }
  }
}

TEST(ProcessGroup, TwoCommunicatorsOfOneGroupDoNotMixTheirMessages) {
  const auto group = make_process_group(*world(), kLong);
  const auto left = make_process_group_communicator(group, {kLong});
  const auto right = make_process_group_communicator(group, {kLong});
  const auto work = [](const std::shared_ptr<Communicator>& communicator, int64_t value) {
    for (int64_t i = 0; i < 50; ++i) {
      auto sum = torch::full({3}, value + i, torch::kInt64);
      communicator->all_reduce(sum);
      ASSERT_TRUE(sum.eq(communicator->size() * (value + i)).all().item<bool>());
    }
  };
  std::thread other(work, right, 1'000'000);
  work(left, 0);
  other.join();
}

// gloo would end the process, of whoever gets more bytes than it expects.
TEST(ProcessGroup, RanksWhoseSizesDoNotFitEndInAnError) {
  ANABRANCH_NEEDS_RANKS(2);
  const int culprit = world()->size() - 1;
  const auto communicator = make_process_group_communicator(make_process_group(*world(), kLong),
                                                            {std::chrono::milliseconds(500)});
  const auto thrown = thrown_by(
      [&] { communicator->all_gather(torch::ones({world()->rank() == culprit ? 5 : 4})); });
  EXPECT_EQ(thrown.kind, Thrown::Kind::kCommunication) << thrown;
  EXPECT_TRUE(thrown.says("not making the call")) << thrown;
  world()->barrier();
}

/// Knows whether it is being coalesced.
class CountingBackend final : public c10d::Backend {
 public:
  CountingBackend() : Backend(0, 1) {}
  const std::string getBackendName() const override { return "counting"; }
  bool supportsCoalescing() const override { return true; }
  void startCoalescing() override { ++begun; }
  c10::intrusive_ptr<c10d::Work> endCoalescing() override {
    ++ended;
    if (fails) throw std::runtime_error("the end fails as well");
    return {};
  }
  int begun = 0;
  int ended = 0;
  bool fails = false;
};

TEST(ProcessGroup, IsNotLeftCoalescingByWhatThrows) {
  const auto backend = c10::make_intrusive<CountingBackend>();
  const auto group = c10::make_intrusive<c10d::ProcessGroup>(0, 1);
  group->setBackend(torch::kCPU, c10d::ProcessGroup::BackendType::CUSTOM, {backend});
  for (const bool fails : {false, true}) {
    backend->fails = fails;
    EXPECT_THROW(
        {
          const Coalescing together(*group, torch::kCPU);
          throw std::logic_error("a send is refused");
        },
        std::logic_error);
    EXPECT_EQ(backend->begun, fails ? 2 : 1);
    EXPECT_EQ(backend->ended, backend->begun);
  }
  backend->fails = false;
  {
    Coalescing together(*group, torch::kCPU);
    together.end();
  }
  EXPECT_EQ(backend->ended, 3);
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
