#include "baselines/torch_engine.h"

#include <gtest/gtest.h>

#include "support/thrown.h"

namespace anabranch::test {
namespace {

constexpr int64_t kHalf = int64_t{1} << 30;

TEST(TorchEngineTest, TheLastRowThatCanBeTold) {
  const auto ends = row_ends({kHalf, 0, kHalf - 1}, torch::kCPU);
  EXPECT_TRUE(ends.equal(
      torch::tensor({int32_t{kHalf}, int32_t{kHalf}, int32_t{2 * kHalf - 1}}, torch::kInt32)));
}

// They would wrap around to negative numbers, and rows before the first be multiplied.
TEST(TorchEngineTest, RefusesRowsBeyond32Bits) {
  EXPECT_INPUT_ERROR(row_ends({kHalf, 0, kHalf}, torch::kCPU), "2^31");
  EXPECT_INPUT_ERROR(row_ends({4 * kHalf, 8}, torch::kCPU), "4294967304");
}

}  // namespace
}  // namespace anabranch::test
