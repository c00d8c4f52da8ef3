#include "kernels/sinkhorn.h"

#include <algorithm>
#include <cmath>

#include "kernels/kernels_fixture.h"

namespace anabranch::test {
namespace {

class SinkhornTest : public KernelsTest {};
ANABRANCH_FOR_EACH_DEVICE(SinkhornTest);

struct Scaled {
  torch::Tensor bias;  // [E]
  torch::Tensor sums;  // [E] that it leaves
  bool ends_clearly;   // no round's sums are as even as to end by rounding
  double least_sum;    // of an expert, before any round
};

/// In fp64, on the factors themselves: rows of `logits` [T, E] to 1, columns to their mean, in turn.
Scaled scale_by_turns(const torch::Tensor& logits) {
  const auto cost = (logits - std::get<0>(logits.max(1, true))).to(torch::kFloat64).exp();
  auto factors = torch::ones({cost.size(1)}, torch::kFloat64);
  Scaled result{{}, {}, /*ends_clearly=*/true, /*least_sum=*/1};
  const auto sums_of = [&] {
    const auto weighted = cost * factors;
    return (weighted / weighted.sum(1, true)).sum(0);
  };
  for (int64_t round = 0; round < kSinkhornRounds; ++round) {
    const auto sums = sums_of();
    const double farthest = (sums / sums.mean() - 1).abs().max().item<double>();
    result.ends_clearly &= std::abs(farthest / kSinkhornTolerance - 1) > 0.02;
    if (farthest <= kSinkhornTolerance) break;
    const auto counted = sums.clamp_min(kLeastSinkhornSum);
    result.least_sum = std::min(result.least_sum, counted.min().item<double>());
    factors = factors * sums.mean() / counted;
  }
  result.sums = sums_of();
  result.bias = factors.log() - factors.log().mean();
  return result;
}

TEST_P(SinkhornTest, EqualsScalingByTurns) {
  for (const int64_t experts : {1, 2, 7, 8, 9, 33, 64, 128, 200, 300, 600, 1024, 1100}) {
    const auto dtype = random_.pick<torch::Dtype>({torch::kFloat32, torch::kFloat64});
    const auto tokens = experts > 256 ? 77 : random_.pick<int64_t>({1, 2, 77, 3000});
    const double share = random_.pick<double>({0, 0.2});
    SCOPED_TRACE(c10::str("T ", tokens, " E ", experts, " ", to_string(dtype)));
    torch::Tensor logits, padding, kept;
    Scaled expected;
    do {
      const double size = random_.pick<double>({0.3, 1, 4});
      logits = size * (random_.normal({tokens, experts}) + random_.normal({experts}));
      logits = logits.to(dtype);
      padding = random_.uniform({tokens}) < share;
      if (random_.chance()) {
        logits[0][random_.integer(0, experts - 1)] =
            random_.pick<double>({NAN, INFINITY, -INFINITY});
      }
      kept = padding.logical_not().logical_and(logits.isfinite().all(1)).nonzero().flatten();
      if (kept.numel() == 0) continue;
      expected = scale_by_turns(logits.index_select(0, kept));
    } while (kept.numel() == 0 || !expected.ends_clearly);
    const auto on = on_device(logits);
    const auto left_out = share > 0 ? on_device(padding) : torch::Tensor();
    const auto bias = routing_.sinkhorn_bias(on, left_out);
    // Each round adds the rounding of its sums, and of exponents as large as logits and biases. On a GPU sums are whole
    // numbers, of all tokens below 2⁶²: a token adds less than 1 too little.
    const double largest = max_abs(logits.index_select(0, kept)) + max_abs(expected.bias);
    const double too_little =
        std::ldexp(static_cast<double>(tokens * tokens), -61) / expected.least_sum;
    EXPECT_TRUE(
        close(bias, expected.bias,
              tolerance(dtype, kSinkhornRounds * (experts + 64), 4 + largest) + too_little));
    EXPECT_TRUE(identical(routing_.sinkhorn_bias(on, left_out), bias));
  }
}

/// Sums are even, whatever the experts had before: by more than fp32's exponentials reach, too.
TEST_P(SinkhornTest, EvensExpertsThatNobodyWants) {
  constexpr int64_t kTokens = 500, kExperts = 12;
  auto logits = random_.normal({kTokens, kExperts}, torch::kFloat32);
  logits.select(1, 3).add_(150);
  logits.select(1, 7).sub_(40);
  const auto bias = routing_.sinkhorn_bias(on_device(logits), {}).cpu();
  const auto sums = torch::softmax(logits.to(torch::kFloat64) + bias, 1).sum(0);
  EXPECT_LT((sums * kExperts / kTokens - 1).abs().max().item<double>(), 0.05);
  EXPECT_LT(std::abs(bias.mean().item<double>()), tolerance(torch::kFloat32, kExperts, 200));
}

TEST_P(SinkhornTest, OfNothingIsNothing) {
  for (const auto dtype : {torch::kFloat32, torch::kFloat64}) {
    const auto logits = on_device(random_.normal({5, 9}, dtype));
    const auto all = on_device(torch::ones({5}, torch::kBool));
    const auto zeros = torch::zeros({9}, dtype);
    EXPECT_TRUE(identical(routing_.sinkhorn_bias(logits, all).cpu(), zeros));
    EXPECT_TRUE(identical(routing_.sinkhorn_bias(logits.narrow(0, 0, 0), {}).cpu(), zeros));
    const auto bad = torch::full({5, 9}, NAN, logits.options());
    EXPECT_TRUE(identical(routing_.sinkhorn_bias(bad, {}).cpu(), zeros));
  }
}

/// The bias of logits chooses by their sum, and weighs and differentiates as without it.
TEST_P(SinkhornTest, ABiasOfLogitsOnlyChooses) {
  for (const auto score : {RouterScore::kSoftmax, RouterScore::kSigmoid}) {
    for (const auto& [tokens, experts] : {std::pair<int64_t, int64_t>{0, 8}, {70, 5}, {33, 130}}) {
      RoutingRule rule;
      rule.top_k = 3;
      rule.router_score = score;
      const auto logits = on_device(random_.normal({tokens, experts}));
      RoutingConditions biased, chosen;
      biased.expert_bias = on_device(3 * random_.normal({experts}));
      chosen.expert_ids = std::get<1>((logits + biased.expert_bias).topk(3, 1)).contiguous();
      const auto found = routing_.route(logits, rule, biased, Choice::kByBiasedLogits);
      const auto expected = routing_.route(logits, rule, chosen);
      EXPECT_TRUE(identical(found.expert_ids, expected.expert_ids));
      EXPECT_TRUE(close(found.weights, expected.weights, tolerance(torch::kFloat64, 8, 1)));
      EXPECT_TRUE(identical(found.probabilities, expected.probabilities));
      EXPECT_TRUE(identical(found.counts, expected.counts));
    }
  }
}

}  // namespace
}  // namespace anabranch::test
