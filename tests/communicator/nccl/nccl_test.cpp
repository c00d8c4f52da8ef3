// What is NCCL's alone: how its ranks find each other, and what happens when one cannot. What it
// moves and sums, communicator_test says of every communicator.
#include <anabranch/build.h>
#include <gtest/gtest.h>

#include "communicator/agreement.h"
#include "communicator/store/store.h"
#include "support/devices.h"
#include "support/thrown.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

const CommunicatorOptions kOptions = {std::chrono::seconds(60)};

/// The group moves tensors in GPU memory and in the host's, and so do groups split from it.
void expect_works(Communicator& nccl) {
  EXPECT_EQ(nccl.name(), "nccl");
  EXPECT_EQ(nccl.rank(), world()->rank());
  for (const auto& place : {device(), torch::Device(torch::kCPU)}) {
    auto ones = torch::ones({3}, place);
    nccl.all_reduce(ones);
    EXPECT_TRUE(ones.eq(nccl.size()).all().item<bool>()) << place;
  }
  const auto half = nccl.split(nccl.rank() % 2, nccl.rank());
  auto ones = torch::ones({3}, device());
  half->all_reduce(ones);
  EXPECT_TRUE(ones.eq(half->size()).all().item<bool>());
  half->barrier();
  nccl.barrier();
  nccl.check();
}

TEST(Nccl, StartsThroughTheLauncher) {
  expect_works(*make_nccl_communicator(world(), device(), kOptions));
}

TEST(Nccl, StartsThroughAStore) {
  int port = 0;
  c10::intrusive_ptr<c10d::Store> store;
  if (world()->rank() == 0) {
    store = open_tcp_store("127.0.0.1", port, /*serves=*/true, kOptions.deadline);
  }
  port = std::stoi(all_gather_strings(*world(), std::to_string(port))[0]);
  if (world()->rank() != 0) {
    store = open_tcp_store("127.0.0.1", port, /*serves=*/false, kOptions.deadline);
  }
  auto bootstrap =
      make_store_communicator(std::move(store), world()->rank(), world()->size(), kOptions);
  expect_works(*make_nccl_communicator(std::move(bootstrap), device(), kOptions));
}

TEST(Nccl, StartsFromAnIdAlone) {
  const std::string id =
      all_gather_strings(*world(), world()->rank() == 0 ? make_nccl_unique_id() : "")[0];
  expect_works(*make_nccl_communicator(id, world()->rank(), world()->size(), device(), kOptions));
}

// Nor does anybody for a rank that is dead: HeartbeatsTest.
TEST(Nccl, NobodyWaitsForARankThatKeepsItsGroup) {
  auto nccl = make_nccl_communicator(world(), device(), kOptions);
  auto ones = torch::ones({3}, device());
  nccl->all_reduce(ones);
  const bool keeps = world()->rank() == world()->size() - 1;
  if (!keeps) {
    nccl.reset();
  }
  world()->barrier();  // of the ranks that have left with the one that has not
  EXPECT_TRUE(ones.eq(world()->size()).all().item<bool>());
  expect_works(*make_nccl_communicator(world(), device(), kOptions));
  if (keeps) {
    nccl->check();
  }
}

TEST(Nccl, NamesTheRankThatCannotStartOnEveryRank) {
  const int culprit = world()->size() - 1;
  const torch::Device nowhere(torch::kCUDA, 99);
  const auto thrown = thrown_by([&] {
    make_nccl_communicator(world(), world()->rank() == culprit ? nowhere : device(), kOptions);
  });
  EXPECT_EQ(thrown.kind, Thrown::Kind::kCommunication) << thrown;
  EXPECT_EQ(thrown.peers, std::vector<int>{culprit}) << thrown;
  EXPECT_TRUE(thrown.says("rank " + std::to_string(culprit) + ": there is no cuda:99")) << thrown;
  expect_works(*make_nccl_communicator(world(), device(), kOptions));
}

TEST(Nccl, RefusesWrongArguments) {
  EXPECT_INPUT_ERROR(make_nccl_communicator(nullptr, device()), "no bootstrap");
  EXPECT_INPUT_ERROR(make_nccl_communicator(world(), torch::kCPU), "cpu is not a GPU");
  EXPECT_INPUT_ERROR(make_nccl_communicator(world(), device(), {std::chrono::milliseconds(0)}),
                     "deadline is 0 ms");
  EXPECT_INPUT_ERROR(make_nccl_communicator("too short", 0, 1, device()), "9 bytes, expected 128");
  EXPECT_INPUT_ERROR(make_nccl_communicator("", 2, 2, device()), "rank 2 of 2");
}

TEST(Nccl, IsDescribedWithItsVersion) {
  const std::string text = describe_build();
  EXPECT_NE(text.find("NCCL 2."), std::string::npos) << text;
  EXPECT_NE(text.find("CUDA runtime"), std::string::npos) << text;
}

}  // namespace
}  // namespace anabranch::test
