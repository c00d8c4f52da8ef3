// Every rule of routing against plain formulas: tests/reference/router.h.
#include <anabranch/router.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "reference/router.h"
#include "support/devices.h"
#include "support/random.h"
#include "support/thrown.h"
#include "support/tolerance.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

/// A rule for so many experts, drawn among all there are.
RoutingRule random_rule(Random& random, int64_t experts) {
  RoutingRule rule;
  std::vector<int64_t> groups;
  for (int64_t count = 1; count <= std::min<int64_t>(experts, 32); ++count) {
    if (experts % count == 0) {
      groups.push_back(count);
    }
  }
  rule.router_score = random.pick<RouterScore>(
      {RouterScore::kSoftmax, RouterScore::kSigmoid, RouterScore::kSqrtSoftplus});
  rule.expert_groups = random.chance() ? 1 : random.pick(groups);
  rule.top_groups = random.integer(1, rule.expert_groups);
  const int64_t size = experts / rule.expert_groups;
  rule.group_score = size == 1 || random.chance() ? GroupScore::kMaximum : GroupScore::kTopTwoSum;
  rule.top_k = random.integer(1, std::min<int64_t>(size * rule.top_groups, 34));
  if (random.chance() && rule.top_k >= rule.top_groups) {
    rule.group_score = rule.router_score == RouterScore::kSoftmax && random.chance()
                           ? GroupScore::kTopShareLogitSum
                           : GroupScore::kTopShareSum;
  }
  rule.renormalize = random.chance();
  rule.routing_scale = random.pick<double>({1, 2.5, 0.3});
  return rule;
}

reference::RoutingFormula formula_of(const RoutingRule& rule, const torch::Tensor& bias) {
  return {.top_k = rule.top_k,
          .renormalize = rule.renormalize,
          .score = rule.router_score,
          .scale = rule.routing_scale,
          .groups = rule.expert_groups,
          .top_groups = rule.top_groups,
          .group_score = rule.group_score,
          .expert_bias = bias};
}

std::string describe(const RoutingRule& rule) {
  return c10::str("k ", rule.top_k, rule.renormalize ? " renormalize" : "", " score ",
                  static_cast<int>(rule.router_score), " scale ", rule.routing_scale, " groups ",
                  rule.top_groups, " of ", rule.expert_groups, " by score ",
                  static_cast<int>(rule.group_score));
}

class RulesTest : public ::testing::TestWithParam<torch::Device> {
 protected:
  torch::Tensor on_device(const torch::Tensor& tensor) const { return tensor.to(GetParam()); }
  void check(const RoutingRule& rule, const torch::Tensor& drawn, const torch::Tensor& bias,
             torch::Dtype dtype);
  Random random_{test_seed()};
};
INSTANTIATE_TEST_SUITE_P(Devices, RulesTest, ::testing::ValuesIn(devices()),
                         [](const auto& info) { return device_name(info.param); });

void RulesTest::check(const RoutingRule& rule, const torch::Tensor& drawn,
                      const torch::Tensor& bias, torch::Dtype dtype) {
  const auto formula = formula_of(rule, bias);
  // Of the tokens those whose experts rounding cannot change.
  const auto clear = reference::choose(drawn, formula).margin > 1e-5;
  const auto exact = drawn.index({clear});
  const auto tokens = exact.size(0);
  const auto experts = exact.size(1);
  ASSERT_GE(tokens, drawn.size(0) / 2);
  const auto dweights = random_.normal({tokens, rule.top_k});
  const auto dsum = random_.normal({experts});
  const auto dsquare = random_.normal({});

  const auto logits64 = exact.clone().requires_grad_();
  const auto expected = reference::choose(logits64, formula);
  const auto log_sum = logits64.logsumexp(1);
  ((expected.weights * dweights).sum() + (expected.probabilities.sum(0) * dsum).sum() +
   log_sum.square().sum() * dsquare)
      .backward();

  const auto logits = on_device(exact.to(dtype)).requires_grad_();
  const auto routing =
      route(logits, rule, bias.defined() ? on_device(bias.to(dtype)) : torch::Tensor());
  ((routing.weights * on_device(dweights.to(dtype))).sum() +
   (routing.probability_sum * on_device(dsum.to(dtype))).sum() +
   routing.squared_logsumexp_sum * on_device(dsquare.to(dtype)))
      .backward();

  const auto length = experts + 12 + static_cast<int64_t>(2 * max_abs(exact));
  EXPECT_TRUE(routing.expert_ids.cpu().equal(expected.expert_ids));
  EXPECT_TRUE(routing.counts.cpu().equal(expected.expert_ids.reshape({-1}).bincount({}, experts)));
  EXPECT_EQ(routing.first_nonfinite_token.item<int64_t>(), -1);
  EXPECT_TRUE(
      close(routing.weights, expected.weights, tolerance(dtype, length, rule.routing_scale)));
  EXPECT_TRUE(close(routing.probability_sum, expected.probabilities.sum(0),
                    tolerance(dtype, length + tokens, static_cast<double>(tokens))));
  // w = c·s / Σ: d logit is s · (…) / Σ at most, s / Σ is 1 at most.
  const double magnitude = 4 * rule.routing_scale * max_abs(dweights) + 2 * max_abs(dsum) +
                           2 * max_abs(log_sum) * max_abs(dsquare);
  EXPECT_TRUE(
      close(logits.grad(), logits64.grad(), tolerance(dtype, 2 * length + rule.top_k, magnitude)));
}

TEST_P(RulesTest, EqualTheirFormulasForwardAndBackward) {
  for (int64_t i = 0; i < effort(150); ++i) {
    const auto experts = random_.pick<int64_t>({1, 2, 3, 6, 8, 16, 30, 64, 160, 256, 1024, 1280});
    const auto rule = random_rule(random_, experts);
    const auto tokens = random_.pick<int64_t>({0, 1, 7, 64, 129});
    const auto dtype = random_.pick<torch::Dtype>({torch::kFloat32, torch::kFloat64});
    SCOPED_TRACE(
        c10::str("T ", tokens, " E ", experts, " ", describe(rule), " ", to_string(dtype)));
    const bool biased = random_.chance() && rule.group_score != GroupScore::kTopShareLogitSum;
    SCOPED_TRACE(biased ? "biased" : "without bias");
    const auto drawn = (random_.pick<double>({0.3, 2}) * random_.normal({tokens, experts}))
                           .to(torch::kFloat32)
                           .to(torch::kFloat64);
    const auto bias =
        biased ? (0.5 * random_.normal({experts})).to(torch::kFloat32).to(torch::kFloat64)
               : torch::Tensor();
    // Among very many small scores some tokens have equals; not where few are chosen among few.
    if ((biased || rule.expert_groups > 1) && experts > 300) {
      const auto clear = reference::choose(drawn, formula_of(rule, bias)).margin > 1e-5;
      if (clear.sum().item<int64_t>() < tokens / 2) {
        continue;
      }
    }
    check(rule, drawn, bias, dtype);
  }
}

// The published models' own settings.
TEST_P(RulesTest, RouteAsPublishedModelsDo) {
  RoutingRule rule;
  rule.top_k = 8;
  const auto draw = [&](int64_t experts) { return 2 * random_.normal({200, experts}); };
  rule.renormalize = false;
  check(rule, draw(64), {}, torch::kFloat32);  // OLMoE
  rule.renormalize = true;
  check(rule, draw(128), {}, torch::kFloat32);  // Qwen3-MoE
  rule.top_k = 2;
  check(rule, draw(8), {}, torch::kFloat32);  // Mixtral
  rule.top_k = 6;
  rule.expert_groups = 8;
  rule.top_groups = 3;
  rule.group_score = GroupScore::kMaximum;
  rule.renormalize = false;
  rule.routing_scale = 16;
  check(rule, draw(160), {}, torch::kFloat32);  // DeepSeek-V2
  rule.top_k = 8;
  rule.top_groups = 4;
  rule.group_score = GroupScore::kTopTwoSum;
  rule.router_score = RouterScore::kSigmoid;
  rule.renormalize = true;
  rule.routing_scale = 2.5;
  check(rule, draw(256), 0.1 * random_.normal({256}), torch::kFloat32);  // DeepSeek-V3
  rule = {};
  rule.top_k = 6;
  rule.router_score = RouterScore::kSqrtSoftplus;
  rule.routing_scale = 1.5;
  check(rule, draw(256), 0.1 * random_.normal({256}), torch::kFloat32);  // DeepSeek-V4-Flash
}

// Far from 0 on either side a score's root neither overflows nor loses its digits.
TEST_P(RulesTest, SqrtSoftplusOfLargeLogits) {
  RoutingRule rule;
  rule.top_k = 3;
  rule.renormalize = false;
  rule.router_score = RouterScore::kSqrtSoftplus;
  for (const auto dtype : {torch::kFloat32, torch::kFloat64}) {
    const auto logits =
        on_device(torch::tensor({{400.0, -70.0, -39.0}}).to(dtype)).requires_grad_();
    const auto routing = route(logits, rule);
    routing.weights.sum().backward();
    const auto expected =
        torch::tensor({{20.0, std::exp(-19.5), std::exp(-35.0)}}, torch::kFloat64);
    const auto slopes =
        torch::tensor({{0.5 / 20, std::exp(-35.0) / 2, std::exp(-19.5) / 2}}, torch::kFloat64);
    const double relative = 1e-9 + 200 * unit_roundoff(dtype);  // e^-39 of a softplus of -39
    EXPECT_TRUE(close(routing.weights, expected, relative * expected));
    EXPECT_TRUE(close(logits.grad(), slopes, relative * slopes));
  }
}

// The softmax over the chosen logits alone is that over all, renormalised.
TEST_P(RulesTest, RenormalisedSoftmaxIsTheSoftmaxAfterTopK) {
  const auto logits = 3 * random_.normal({50, 20});
  const auto routing = route(on_device(logits), 4, /*renormalize=*/true);
  const auto chosen = std::get<0>(logits.topk(4, 1));
  EXPECT_TRUE(close(routing.weights, torch::softmax(chosen, 1), tolerance(torch::kFloat64, 40, 1)));
}

TEST_P(RulesTest, BiasChoosesButDoesNotWeigh) {
  RoutingRule rule;
  rule.router_score = RouterScore::kSigmoid;
  rule.renormalize = false;
  const auto logits = on_device(torch::tensor({{2.0, 1.0, 0.0}}));
  const auto bias = on_device(torch::tensor({0.0, 0.0, 5.0}));
  const auto routing = route(logits, rule, bias);
  EXPECT_EQ(routing.expert_ids.item<int64_t>(), 2);
  EXPECT_EQ(routing.weights.item<double>(), 0.5);
}

// However low all scores of the best group are, biased below those of the others' zero.
TEST_P(RulesTest, ExpertsOutsideTheBestGroupsAreNeverTaken) {
  RoutingRule rule;
  rule.top_k = 2;
  rule.expert_groups = 2;
  rule.router_score = RouterScore::kSigmoid;
  const auto logits = on_device(torch::tensor({{0.0, 0.0, 4.0, 3.0}}));
  const auto bias = on_device(torch::tensor({-9.0, -9.0, -5.0, -5.0}));
  const auto routing = route(logits, rule, bias);
  EXPECT_TRUE(routing.expert_ids.cpu().equal(torch::tensor({{2, 3}})));
}

TEST_P(RulesTest, TiesGoToTheLowestGroupAndExpert) {
  RoutingRule rule;
  rule.top_k = 3;
  rule.expert_groups = 4;
  rule.top_groups = 2;
  for (const auto score : {RouterScore::kSoftmax, RouterScore::kSigmoid}) {
    rule.router_score = score;
    const auto equal = route(on_device(torch::zeros({2, 12})), rule);
    EXPECT_TRUE(equal.expert_ids.cpu().equal(torch::tensor({{0, 1, 2}, {0, 1, 2}})));
    // 0 lies below the others' scores only in the first and third group.
    auto logits = torch::zeros({1, 12});
    logits.slice(1, 0, 3).fill_(-1);
    logits.slice(1, 6, 9).fill_(-1);
    EXPECT_TRUE(route(on_device(logits), rule).expert_ids.cpu().equal(torch::tensor({{3, 4, 5}})));
  }
}

TEST_P(RulesTest, NamesTokensWhoseScoresAreNotFinite) {
  for (const auto score : {RouterScore::kSoftmax, RouterScore::kSigmoid}) {
    RoutingRule rule;
    rule.top_k = 2;
    rule.router_score = score;
    const auto good = random_.normal({9, 6}, torch::kFloat32);
    for (const double bad : {std::nan(""), HUGE_VAL, -HUGE_VAL}) {
      auto logits = good.clone();
      logits[4][3] = bad;
      EXPECT_EQ(route(on_device(logits), rule).first_nonfinite_token.item<int64_t>(), 4) << bad;
      const auto bias = torch::full({6}, 0.1F);
      bias[1] = bad;
      const auto biased = route(on_device(good), rule, on_device(bias));
      EXPECT_EQ(biased.first_nonfinite_token.item<int64_t>(), 0) << bad;
    }
  }
}

TEST_P(RulesTest, LargeLogitsNeitherOverflowNorVanish) {
  RoutingRule rule;
  rule.top_k = 2;
  rule.router_score = RouterScore::kSigmoid;
  const auto logits = on_device(torch::tensor({{300.0F, -300.0F, 200.0F}})).requires_grad_();
  const auto routing = route(logits, rule);
  EXPECT_TRUE(routing.expert_ids.cpu().equal(torch::tensor({{0, 2}})));
  EXPECT_TRUE(routing.weights.eq(0.5).all().item<bool>());
  (routing.weights.sum() + routing.probability_sum[1]).backward();
  EXPECT_TRUE(logits.grad().isfinite().all().item<bool>());
}

TEST_P(RulesTest, RefusesImpossibleRules) {
  const auto logits = on_device(torch::zeros({4, 12}));
  const auto refuse = [&](const std::function<void(RoutingRule&)>& change,
                          const std::string& text) {
    RoutingRule rule;
    change(rule);
    EXPECT_INPUT_ERROR(route(logits, rule), text);
  };
  refuse([](RoutingRule& r) { r.expert_groups = 5; }, "expert_groups = 5");
  refuse([](RoutingRule& r) { r.expert_groups = 0; }, "expert_groups = 0");
  refuse([](RoutingRule& r) { r.top_groups = 2; }, "top_groups = 2 of 1");
  refuse([](RoutingRule& r) { r.top_groups = 0; }, "top_groups = 0");
  refuse([](RoutingRule& r) { r.expert_groups = 12; }, "groups of one expert");
  refuse(
      [](RoutingRule& r) {
        r.expert_groups = 4;
        r.top_groups = 2;
        r.group_score = GroupScore::kTopShareSum;
      },
      "share of top_k = 1 with top_groups = 2");
  refuse(
      [](RoutingRule& r) {
        r.expert_groups = 4;
        r.group_score = GroupScore::kTopShareLogitSum;
        r.router_score = RouterScore::kSigmoid;
      },
      "other than softmax");
  refuse(
      [](RoutingRule& r) {
        r.expert_groups = 4;
        r.top_k = 4;
      },
      "top_k = 4 from top_groups = 1 groups of 3");
  for (const double scale : {0.0, -1.0, std::nan(""), HUGE_VAL}) {
    refuse([&](RoutingRule& r) { r.routing_scale = scale; }, "routing_scale");
  }
  EXPECT_INPUT_ERROR(route(on_device(torch::zeros({4, 33})), {.expert_groups = 33}), "32");
  EXPECT_INPUT_ERROR(route(logits, RoutingRule(), on_device(torch::zeros({11}))), "[11]");
  EXPECT_INPUT_ERROR(route(logits, RoutingRule(), on_device(torch::zeros({12}, torch::kFloat64))),
                     "Double");
  EXPECT_INPUT_ERROR(route(logits, RoutingRule(), torch::zeros({12}, torch::kMeta)), "meta");
}

}  // namespace
}  // namespace anabranch::test
