// NCCL against what each rank can compute for itself. Several ranks need a GPU each, or NCCL 2.30.3
// with NCCL_MULTI_RANK_GPU_ENABLE=1.
#include <ATen/Context.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <numeric>

#include "support/random.h"
#include "support/tolerance.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

class NcclTest : public ::testing::Test {
 protected:
  void SetUp() override {
    const auto gpus = static_cast<int>(at::getNumGPUs());
    const bool shared = std::getenv("NCCL_MULTI_RANK_GPU_ENABLE") != nullptr;
    if (gpus == 0 || (gpus < world()->size() && !shared)) {
      GTEST_SKIP() << world()->size() << " ranks on " << gpus << " GPUs";
    }
    device_ = torch::Device(torch::kCUDA, static_cast<c10::DeviceIndex>(world()->rank() % gpus));
    nccl_ = make_nccl_communicator(world(), device_);
  }

  /// What `rank` holds: the same numbers on every rank that asks.
  torch::Tensor of_rank(int rank, torch::IntArrayRef sizes, torch::Dtype dtype) {
    Random random(test_seed() + static_cast<uint64_t>(rank));
    return (4 * random.normal(sizes)).to(dtype);
  }

  torch::Device device_{torch::kCPU};
  std::shared_ptr<Communicator> nccl_;
  Random random_{test_seed()};
};

TEST_F(NcclTest, AllToAllMovesRows) {
  const int ranks = nccl_->size();
  const int own = nccl_->rank();
  for (int64_t i = 0; i < effort(20); ++i) {
    std::vector<std::vector<int64_t>> rows(ranks, std::vector<int64_t>(ranks));
    for (auto& from : rows) {
      for (auto& count : from) {
        count = random_.pick<int64_t>({0, 0, 1, 5, 300});
      }
    }
    const auto width = random_.pick<int64_t>({1, 7, 64});
    const auto sum = [](const std::vector<int64_t>& counts) {
      return std::accumulate(counts.begin(), counts.end(), int64_t{0});
    };
    std::vector<torch::Tensor> expected;
    std::vector<int64_t> receive_rows;
    for (int peer = 0; peer < ranks; ++peer) {
      const auto before = std::accumulate(rows[peer].begin(), rows[peer].begin() + own, int64_t{0});
      expected.push_back(of_rank(peer, {sum(rows[peer]), width}, torch::kBFloat16)
                             .narrow(0, before, rows[peer][own]));
      receive_rows.push_back(rows[peer][own]);
    }
    const auto send = of_rank(own, {sum(rows[own]), width}, torch::kBFloat16).to(device_);
    auto receive = torch::empty({sum(receive_rows), width}, send.options());
    nccl_->all_to_all_v({{send, rows[own], receive, receive_rows}});
    EXPECT_TRUE(identical(receive.cpu(), torch::cat(expected)));
  }
}

TEST_F(NcclTest, AllReduceSumsInRankOrder) {
  for (const auto dtype : {torch::kFloat32, torch::kFloat64, torch::kBFloat16, torch::kInt64}) {
    for (const int64_t size : {0, 1, 5, 1000}) {
      const auto wide = dtype == torch::kBFloat16 ? torch::kFloat32 : dtype;
      auto expected = of_rank(0, {size}, dtype).to(wide);
      for (int rank = 1; rank < nccl_->size(); ++rank) {
        expected += of_rank(rank, {size}, dtype).to(wide);
      }
      auto tensor = of_rank(nccl_->rank(), {size}, dtype).to(device_);
      nccl_->all_reduce(tensor);
      EXPECT_TRUE(identical(tensor.cpu(), expected.to(dtype))) << to_string(dtype) << " " << size;
    }
  }
}

TEST_F(NcclTest, AllGatherAndBroadcast) {
  std::vector<torch::Tensor> all;
  for (int rank = 0; rank < nccl_->size(); ++rank) {
    all.push_back(of_rank(rank, {3, 5}, torch::kFloat32));
  }
  EXPECT_TRUE(
      identical(nccl_->all_gather(all[nccl_->rank()].to(device_)).cpu(), torch::stack(all)));
  for (int root = 0; root < nccl_->size(); ++root) {
    auto tensor = all[nccl_->rank()].to(device_);
    nccl_->broadcast(tensor, root);
    EXPECT_TRUE(identical(tensor.cpu(), all[root]));
  }
}

TEST_F(NcclTest, SplitMakesGroups) {
  const auto half = nccl_->split(nccl_->rank() % 2, -nccl_->rank());
  auto ones = torch::ones({1}, torch::TensorOptions(torch::kFloat32).device(device_));
  half->all_reduce(ones);
  EXPECT_EQ(ones.item<float>(), static_cast<float>(half->size()));
  half->barrier();
  nccl_->barrier();
}

}  // namespace
}  // namespace anabranch::test
