// Streams beside the caller's, when what they were given is cut short.
#include "gemm/cublas/fork.h"

#include <c10/cuda/CUDAStream.h>
#include <gtest/gtest.h>

#include <chrono>
#include <stdexcept>
#include <thread>

#include "support/devices.h"

namespace anabranch::test {
namespace {

class ForkTest : public ::testing::Test {
 protected:
  // Zeros, which a branch overwrites with ones, but slowly.
  void overwrite(const SideBranch& branch) {
    const auto dawdle = [](void*) { std::this_thread::sleep_for(std::chrono::milliseconds(200)); };
    check_cuda(cudaLaunchHostFunc(branch.stream, dawdle, nullptr), "cudaLaunchHostFunc");
    check_cuda(cudaMemsetAsync(memory_.data_ptr(), 1, memory_.nbytes(), branch.stream),
               "cudaMemsetAsync");
  }
  // Reads in the order of the caller's stream.
  int64_t sum() { return memory_.sum().item<int64_t>(); }

  torch::Tensor memory_ =
      torch::zeros({1 << 16}, torch::TensorOptions(torch::kByte).device(device()));
  CudaStream stream_ = make_cuda_stream();
  CudaEvent begun_ = make_cuda_event();
  CudaEvent done_ = make_cuda_event();
  SideBranch branch_ = {stream_, done_};
};

TEST_F(ForkTest, TheCallersStreamComesBehind) {
  Fork fork(c10::cuda::getCurrentCUDAStream(), begun_);
  fork.to(branch_);
  overwrite(branch_);
  fork.join();
  EXPECT_EQ(sum(), memory_.numel());
}

TEST_F(ForkTest, AndDoesSoAlsoAfterAnException) {
  const auto cut_short = [&] {
    Fork fork(c10::cuda::getCurrentCUDAStream(), begun_);
    fork.to(branch_);
    overwrite(branch_);
    throw std::runtime_error("in the middle");
  };
  EXPECT_THROW(cut_short(), std::runtime_error);
  EXPECT_EQ(sum(), memory_.numel());
}

}  // namespace
}  // namespace anabranch::test
