#include "experts/shared_expert.h"

#include <gtest/gtest.h>

#include <set>

#include "support/devices.h"
#include "support/random.h"
#include "support/tolerance.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

class SharedExpertTest : public ::testing::TestWithParam<torch::Device> {
 protected:
  Random random_{test_seed()};
};
INSTANTIATE_TEST_SUITE_P(Devices, SharedExpertTest, ::testing::ValuesIn(devices()),
                         [](const auto& info) { return device_name(info.param); });

// A sum over so many tokens that cuBLAS splits it, and of such a number that it may lose some: few of the
// tokens are not zero, so that the sums are known exactly.
TEST_P(SharedExpertTest, TheGatesGradientLosesNoToken) {
  for (const auto dtype : all_dtypes()) {
    const auto options = torch::TensorOptions(dtype).device(GetParam());
    for (const int64_t tokens : {4095, 8193, 8195, 12291, 15107}) {
      const auto width = random_.pick<int64_t>({40, 512, 1024});
      SCOPED_TRACE(c10::str(tokens, " tokens of ", width, " ", to_string(dtype)));
      auto x = torch::zeros({tokens, width}, torch::kFloat64);
      auto y = torch::zeros({tokens, width}, torch::kFloat64);
      auto expected = torch::zeros({1, width}, torch::kFloat64);
      std::set<int64_t> marked = {0, tokens - 3, tokens - 2, tokens - 1};
      for (int64_t token = 128; token < tokens; token += 128) {
        marked.insert({token - 1, token});
      }
      for (const int64_t token : marked) {
        const int64_t column = random_.integer(0, width - 1);
        x[token][column] = 1;
        y[token][random_.integer(0, width - 1)] = 4;  // times the slope of the sigmoid at 0: 1
        expected[0][column] += 1;
      }
      const auto gate = torch::zeros({1, width}, options).requires_grad_();
      gated(y.to(options), x.to(options), gate).sum().backward();
      EXPECT_TRUE(gate.grad().cpu().to(torch::kFloat64).equal(expected));
    }
  }
}

}  // namespace
}  // namespace anabranch::test
