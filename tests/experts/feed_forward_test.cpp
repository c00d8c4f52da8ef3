#include "experts/feed_forward.h"

#include <gtest/gtest.h>

#include <numeric>

#include "reference/dense_moe.h"
#include "support/devices.h"
#include "support/random.h"
#include "support/tolerance.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

const std::vector<Activation> kActivations = {Activation::kGeluTanh, Activation::kGelu,
                                              Activation::kRelu, Activation::kSilu};

class FeedForwardTest : public ::testing::TestWithParam<torch::Device> {
 protected:
  torch::Tensor draw(torch::IntArrayRef sizes) { return random_.normal(sizes).to(GetParam()); }
  Random random_{test_seed()};
};
INSTANTIATE_TEST_SUITE_P(Devices, FeedForwardTest, ::testing::ValuesIn(devices()),
                         [](const auto& info) { return device_name(info.param); });

// Up, activation, down and back, in fp64, expert by expert against autograd.
TEST_P(FeedForwardTest, EqualsOneExpertAfterAnother) {
  const ExpertCounts counts = {4, 0, 9, 1};
  const int64_t h = 6;
  const int64_t n = 5;
  const int64_t rows = 14;
  for (const auto activation : kActivations) {
    for (const bool glu : {false, true}) {
      for (const bool bias : {false, true}) {
        for (const bool weighted : {false, true}) {
          SCOPED_TRACE(c10::str("activation ", static_cast<int>(activation), " glu ", glu, " bias ",
                                bias, " weighted ", weighted));
          const int64_t m = glu ? 2 * n : n;
          const Projection up = {draw({4, m, h}), bias ? draw({4, m}) : torch::Tensor()};
          const Projection down = {draw({4, h, n}), bias ? draw({4, h}) : torch::Tensor()};
          const auto x = draw({rows, h});
          const auto dy = draw({rows, h});
          const auto values = weighted ? draw({rows}) : torch::Tensor();
          const FeedForward feed_forward = {make_grouped_gemm_engine(GetParam()), activation, glu};

          const auto hidden = project(feed_forward, x, up, counts);
          const auto y = project(feed_forward, activate(feed_forward, hidden), down, counts);
          const auto down_gradient = down_backward(feed_forward, dy, hidden, values, down, counts);
          const auto up_gradient = up_backward(feed_forward, down_gradient.dhidden, x, up, counts);

          const auto leaf = [](const torch::Tensor& tensor) {
            return tensor.defined() ? tensor.detach().clone().requires_grad_() : torch::Tensor();
          };
          const Projection up_leaf = {leaf(up.weight), leaf(up.bias)};
          const Projection down_leaf = {leaf(down.weight), leaf(down.bias)};
          const auto x_leaf = leaf(x);
          const auto values_leaf = leaf(weighted ? values : torch::ones_like(x.select(1, 0)));
          std::vector<torch::Tensor> results;
          int64_t row = 0;
          for (size_t e = 0; e < counts.size(); ++e) {
            const auto index = static_cast<int64_t>(e);
            results.push_back(reference::expert(
                x_leaf.slice(0, row, row + counts[e]), up_leaf.weight[index],
                bias ? up_leaf.bias[index] : torch::Tensor(), down_leaf.weight[index],
                bias ? down_leaf.bias[index] : torch::Tensor(), activation, glu));
            row += counts[e];
          }
          const auto expected = torch::cat(results);
          (expected * values_leaf.unsqueeze(1) * dy).sum().backward();

          const auto near = [&](const torch::Tensor& actual, const torch::Tensor& exact) {
            return close(actual, exact,
                         tolerance(torch::kFloat64, 8 * (rows + h + m + n), 1 + max_abs(exact)));
          };
          EXPECT_TRUE(near(y, expected));
          EXPECT_TRUE(near(down_gradient.dvalues, values_leaf.grad()));
          EXPECT_TRUE(near(down_gradient.parameters.weight, down_leaf.weight.grad()));
          EXPECT_TRUE(near(up_gradient.parameters.weight, up_leaf.weight.grad()));
          EXPECT_TRUE(near(up_gradient.dx, x_leaf.grad()));
          if (bias) {
            EXPECT_TRUE(near(down_gradient.parameters.bias, down_leaf.bias.grad()));
            EXPECT_TRUE(near(up_gradient.parameters.bias, up_leaf.bias.grad()));
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace anabranch::test
