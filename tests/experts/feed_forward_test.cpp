#include "experts/feed_forward.h"

#include <gtest/gtest.h>

#include <numeric>

#include "kernels/plan.h"
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

struct Gradients {
  torch::Tensor y;
  Projection up;
  Projection down;
  torch::Tensor x;
  torch::Tensor values;
};

torch::Tensor leaf(const torch::Tensor& tensor) {
  return tensor.defined() ? tensor.detach().clone().requires_grad_() : torch::Tensor();
}

/// Expert by expert, by autograd.
Gradients expected(const torch::Tensor& x, const torch::Tensor& dy, const torch::Tensor& values,
                   const ExpertProjections& parameters, const std::vector<int64_t>& counts,
                   const FeedForward& expert) {
  const Projection up = {leaf(parameters.up.weight), leaf(parameters.up.bias)};
  const Projection down = {leaf(parameters.down.weight), leaf(parameters.down.bias)};
  const auto x_leaf = leaf(x);
  const auto values_leaf = leaf(values.defined() ? values : torch::ones_like(x.select(1, 0)));
  const auto of = [](const torch::Tensor& bias, int64_t e) {
    return bias.defined() ? bias[e] : torch::Tensor();
  };
  std::vector<torch::Tensor> results;
  int64_t row = 0;
  for (size_t i = 0; i < counts.size(); ++i) {
    const auto e = static_cast<int64_t>(i);
    results.push_back(reference::expert(x_leaf.slice(0, row, row + counts[i]), up.weight[e],
                                        of(up.bias, e), down.weight[e], of(down.bias, e),
                                        expert.activation.activation, expert.activation.glu));
    row += counts[i];
  }
  const auto y = torch::cat(results);
  (y * values_leaf.unsqueeze(1) * dy).sum().backward();
  const auto grad = [](const torch::Tensor& tensor) {
    return tensor.defined() ? tensor.grad() : torch::Tensor();
  };
  return {y,
          {up.weight.grad(), grad(up.bias)},
          {down.weight.grad(), grad(down.bias)},
          x_leaf.grad(),
          values_leaf.grad()};
}

// Up, activation, down and back, in fp64; experts without rows, rows for one part and for several, more
// experts than parts, rows given by index.
TEST_P(FeedForwardTest, EqualsOneExpertAfterAnother) {
  const int64_t h = 6;
  const int64_t n = 5;
  const std::vector<std::vector<int64_t>> splits = {
      {4, 0, 9, 1}, {0, 0, 7}, {5, 0}, {0, 0, 0}, {1, 2, 0, 3, 1, 0, 0, 4, 1, 2, 6, 1, 0}};
  for (const auto activation : kActivations) {
    for (int flags = 0; flags < 32; ++flags) {
      const bool glu = flags & 1;
      const bool bias = flags & 2;
      const bool weighted = flags & 4;
      const bool indexed = flags & 8;
      const bool kept = flags & 16;
      auto counts = random_.pick(splits);
      const auto times = random_.pick<int64_t>({1, 40});
      for (auto& count : counts) count *= times;
      const int64_t rows = std::accumulate(counts.begin(), counts.end(), int64_t{0});
      SCOPED_TRACE(c10::str("activation ", static_cast<int>(activation), " glu ", glu, " bias ",
                            bias, " weighted ", weighted, " indexed ", indexed, " kept ", kept,
                            " counts ", counts));
      const auto experts = static_cast<int64_t>(counts.size());
      const int64_t m = glu ? 2 * n : n;
      const auto some = [&](bool wanted, torch::IntArrayRef sizes) {
        return wanted ? draw(sizes) : torch::Tensor();
      };
      const ExpertProjections parameters = {{draw({experts, m, h}), some(bias, {experts, m})},
                                            {draw({experts, h, n}), some(bias, {experts, h})}};
      const auto given_rows = [&] {
        if (!indexed) {
          return IndexedRows{draw({rows, h}), {}};
        }
        const auto index = torch::randint(3, {rows}, torch::kInt64).to(GetParam());
        return IndexedRows{draw({3, h}), index, PlanKernels::on(GetParam()).group(index, 3)};
      };
      const auto all = [](const IndexedRows& from) {
        return from.index.defined() ? from.rows.index_select(0, from.index) : from.rows;
      };
      const auto x = given_rows();
      const auto dy = given_rows();
      const auto values = some(weighted, {rows});
      const FeedForward expert = {make_grouped_gemm_engine(GetParam()), {activation, glu}};

      const auto [y, hidden] = feed_forward(expert, x, parameters, counts, kept);
      EXPECT_EQ(hidden.defined(), kept);
      const auto actual = feed_forward_backward(expert, dy, x, hidden, values, parameters, counts);
      if (kept) {
        const auto overwritten =
            feed_forward_backward(expert, dy, x, hidden.clone(), values, parameters, counts,
                                  /*overwrite_hidden=*/true);
        EXPECT_TRUE(identical(overwritten.dx, actual.dx));
        EXPECT_TRUE(identical(overwritten.parameters.up.weight, actual.parameters.up.weight));
      }
      const auto exact = expected(all(x), all(dy), values, parameters, counts, expert);

      const auto near = [&](const torch::Tensor& result, const torch::Tensor& reference) {
        const double size = reference.numel() > 0 ? max_abs(reference) : 0;
        return close(result, reference,
                     tolerance(torch::kFloat64, 8 * (rows + h + m + n), 1 + size));
      };
      EXPECT_TRUE(near(y, exact.y));
      EXPECT_TRUE(near(actual.drouting_weights, exact.values));
      EXPECT_TRUE(near(actual.dx, exact.x));
      EXPECT_TRUE(near(actual.parameters.down.weight, exact.down.weight));
      EXPECT_TRUE(near(actual.parameters.up.weight, exact.up.weight));
      EXPECT_EQ(actual.parameters.up.bias.defined(), bias);
      EXPECT_EQ(actual.parameters.down.bias.defined(), bias);
      if (bias) {
        EXPECT_TRUE(near(actual.parameters.down.bias, exact.down.bias));
        EXPECT_TRUE(near(actual.parameters.up.bias, exact.up.bias));
      }
    }
  }
}

TEST_P(FeedForwardTest, RankWithoutExperts) {
  const FeedForward expert = {make_grouped_gemm_engine(GetParam()), {Activation::kGelu, false}};
  const ExpertProjections parameters = {{draw({0, 5, 6}), draw({0, 5})},
                                        {draw({0, 6, 5}), draw({0, 6})}};
  const IndexedRows none = {draw({0, 6}), {}};
  const auto [y, hidden] = feed_forward(expert, none, parameters, {}, /*keep_hidden=*/true);
  EXPECT_EQ(y.sizes(), (std::vector<int64_t>{0, 6}));
  EXPECT_EQ(hidden.sizes(), (std::vector<int64_t>{0, 5}));
  const auto gradient = feed_forward_backward(expert, none, none, hidden, {}, parameters, {});
  EXPECT_EQ(gradient.dx.sizes(), (std::vector<int64_t>{0, 6}));
  EXPECT_EQ(gradient.drouting_weights.sizes(), (std::vector<int64_t>{0}));
  EXPECT_EQ(gradient.parameters.up.weight.sizes(), parameters.up.weight.sizes());
  EXPECT_EQ(gradient.parameters.down.bias.sizes(), parameters.down.bias.sizes());
}

}  // namespace
}  // namespace anabranch::test
