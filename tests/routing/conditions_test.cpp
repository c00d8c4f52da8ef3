// Choices and padding from outside, sums of sequences, forced routing and the router in fp64, each against
// plain formulas.
#include <anabranch/router.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <set>
#include <tuple>
#include <utility>
#include <vector>

#include "reference/router.h"
#include "support/devices.h"
#include "support/random.h"
#include "support/thrown.h"
#include "support/tolerance.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

RoutingRule random_simple_rule(Random& random, int64_t experts) {
  RoutingRule rule;
  rule.router_score = random.pick<RouterScore>(
      {RouterScore::kSoftmax, RouterScore::kSigmoid, RouterScore::kSqrtSoftplus});
  rule.top_k = random.integer(1, std::min<int64_t>(experts, 9));
  rule.renormalize = random.chance();
  rule.routing_scale = random.pick<double>({1, 2.5});
  if (experts % 4 == 0 && random.chance()) {
    rule.expert_groups = 4;
    rule.top_groups = 4;
  }
  rule.group_score = GroupScore::kMaximum;
  return rule;
}

class ConditionsTest : public ::testing::TestWithParam<torch::Device> {
 protected:
  torch::Tensor on_device(const torch::Tensor& tensor) const {
    return tensor.defined() ? tensor.to(GetParam()) : tensor;
  }
  RoutingConditions on_device(const RoutingConditions& conditions) const {
    return {on_device(conditions.expert_bias),  on_device(conditions.expert_ids),
            on_device(conditions.padding_mask), conditions.sequences,
            conditions.bias_histogram,          on_device(conditions.near_experts)};
  }
  /// [T, k] distinct experts of each token, some of them none.
  torch::Tensor random_ids(int64_t tokens, int64_t experts, int64_t top_k) {
    auto ids = torch::empty({tokens, top_k}, torch::kInt64);
    for (int64_t t = 0; t < tokens; ++t) {
      ids[t] = random_.permutation(experts).slice(0, 0, top_k);
    }
    return ids.masked_fill(random_.uniform({tokens, top_k}) < 0.2, -1);
  }
  Random random_{test_seed()};
};
INSTANTIATE_TEST_SUITE_P(Devices, ConditionsTest, ::testing::ValuesIn(devices()),
                         [](const auto& info) { return device_name(info.param); });

/// Of given ids [T, k], −1 for none, by the formulas.
torch::Tensor weights_of(const torch::Tensor& logits, const torch::Tensor& ids,
                         const RoutingRule& rule) {
  const auto scores = rule.router_score == RouterScore::kSoftmax ? torch::softmax(logits, 1)
                      : rule.router_score == RouterScore::kSigmoid
                          ? torch::sigmoid(logits)
                          : (1 + logits.exp()).log().sqrt();
  auto weights = scores.gather(1, ids.clamp_min(0)).masked_fill(ids < 0, 0);
  if (rule.renormalize) {
    weights = weights / (weights.sum(1, /*keepdim=*/true) + 1e-20);
  }
  return weights * rule.routing_scale;
}

TEST_P(ConditionsTest, AGivenChoiceIsWeighedAndDifferentiated) {
  for (int64_t i = 0; i < effort(40); ++i) {
    const auto experts = random_.pick<int64_t>({1, 4, 8, 30, 128, 1280});
    const auto rule = random_simple_rule(random_, experts);
    const auto tokens = random_.pick<int64_t>({0, 1, 33});
    SCOPED_TRACE(c10::str("T ", tokens, " E ", experts, " k ", rule.top_k, " score ",
                          static_cast<int>(rule.router_score)));
    const auto ids = random_ids(tokens, experts, rule.top_k);
    const auto drawn = random_.normal({tokens, experts});
    const auto dweights = random_.normal({tokens, rule.top_k});
    const auto exact = drawn.clone().requires_grad_();
    const auto expected = weights_of(exact, ids, rule);
    (expected * dweights).sum().backward();

    const auto logits = on_device(drawn).requires_grad_();
    RoutingConditions conditions;
    conditions.expert_ids = on_device(ids);
    const auto routing = route(logits, rule, conditions);
    (routing.weights * on_device(dweights)).sum().backward();
    const auto valid = ids.masked_select(ids >= 0);
    EXPECT_TRUE(routing.expert_ids.cpu().equal(ids));
    EXPECT_TRUE(routing.counts.cpu().equal(valid.bincount({}, experts)));
    EXPECT_TRUE(routing.may_skip);
    EXPECT_TRUE(close(routing.weights, expected,
                      tolerance(torch::kFloat64, experts + 20, rule.routing_scale * 4)));
    // The sum of the chosen scores may be a small one, of an expert far from the best.
    EXPECT_TRUE(torch::allclose(logits.grad().cpu(), exact.grad(), 1e-9, 1e-12));
  }
}

/// FasterMoE's gate, choice by choice: `best` [T, E] experts of each token by falling score.
torch::Tensor mostly_near(const torch::Tensor& best, const torch::Tensor& ids,
                          const torch::Tensor& weights, const torch::Tensor& near, double share) {
  const auto is_near = [&](int64_t expert) { return near[expert].item<bool>(); };
  std::vector<std::tuple<double, int64_t, int64_t>> far;  // by falling weight
  int64_t chosen = 0;
  for (int64_t t = 0; t < ids.size(0); ++t) {
    for (int64_t k = 0; k < ids.size(1); ++k) {
      const auto expert = ids[t][k].item<int64_t>();
      chosen += expert >= 0 ? 1 : 0;
      if (expert >= 0 && !is_near(expert)) far.emplace_back(-weights[t][k].item<double>(), t, k);
    }
  }
  std::sort(far.begin(), far.end());
  const auto kept = static_cast<size_t>(std::floor(static_cast<double>(chosen) * share));
  std::set<std::pair<int64_t, int64_t>> lose;
  for (size_t i = kept; i < far.size(); ++i) lose.emplace(std::get<1>(far[i]), std::get<2>(far[i]));
  auto result = ids.clone();
  for (const auto& [t, k] : lose) {
    for (int64_t place = 0; place < best.size(1); ++place) {
      const auto expert = best[t][place].item<int64_t>();
      if (is_near(expert) && !(result[t] == expert).any().item<bool>()) {
        result[t][k] = expert;
        break;
      }
    }
  }
  return result;
}

TEST_P(ConditionsTest, WhatMayNotLeaveTheNodeChoosesAgainWithinIt) {
  for (int64_t i = 0; i < effort(30); ++i) {
    MoEOptions options;
    options.num_experts = options.hidden_size = random_.pick<int64_t>({1, 4, 8, 30});
    options.expert_hidden_size = 1;
    options.top_k = random_.integer(1, std::min<int64_t>(options.num_experts, 5));
    options.router_score = random_.pick<RouterScore>(
        {RouterScore::kSoftmax, RouterScore::kSigmoid, RouterScore::kSqrtSoftplus});
    options.renormalize = options.top_k > 1 && random_.chance();
    options.cross_node_limit = random_.pick<double>({1e-9, 0.1, 0.4, 1});
    options.dtype = torch::kFloat64;
    const auto rule = RoutingRule{options.top_k, options.renormalize, options.router_score};
    const int64_t tokens = random_.pick<int64_t>({0, 1, 40});
    SCOPED_TRACE(c10::str("T ", tokens, " E ", options.num_experts, " k ", rule.top_k, " limit ",
                          options.cross_node_limit));
    const auto logits = random_.normal({tokens, options.num_experts});
    const auto bias = 0.3 * random_.normal({options.num_experts});
    const auto near = random_.uniform({options.num_experts}) < 0.5;
    const auto padding = random_.uniform({tokens}) < 0.2;
    const auto whole = torch::arange(options.num_experts).expand({tokens, -1});
    const auto scores = weights_of(logits, whole, {options.num_experts, false, rule.router_score});
    const auto best = (scores + bias).argsort(/*stable=*/true, /*dim=*/1, /*descending=*/true);
    const auto first = best.narrow(1, 0, rule.top_k).masked_fill(padding.unsqueeze(1), -1);
    const auto expected =
        mostly_near(best, first, weights_of(logits, first, rule), near, options.cross_node_limit);

    RoutingConditions conditions;
    conditions.near_experts = on_device(near);
    conditions.padding_mask = on_device(padding);
    RouterParameters router;  // whose logits are x
    router.weight = on_device(torch::eye(options.num_experts, torch::kFloat64)).requires_grad_();
    router.expert_bias = on_device(bias);
    const auto routing = route_tokens(on_device(logits), router, options, true, conditions);
    EXPECT_TRUE(routing.expert_ids.cpu().equal(expected));
    EXPECT_TRUE(close(routing.weights, weights_of(logits, expected, rule),
                      tolerance(torch::kFloat64, options.num_experts + 20, 4)));
    EXPECT_TRUE(routing.weights.requires_grad());
    const auto free = route_tokens(on_device(logits), router, options, false, conditions);
    EXPECT_TRUE(free.expert_ids.cpu().equal(first));
  }
}

TEST_P(ConditionsTest, TokensWithAChoiceOfTheirOwnAreRoutedByTheRule) {
  RoutingRule rule;
  rule.top_k = 3;
  const auto logits = random_.normal({20, 16});
  auto ids = random_ids(20, 16, 3);
  const auto own = random_.uniform({20}) < 0.5;
  ids.select(1, 0).masked_fill_(own, kOwnChoice);
  RoutingConditions conditions;
  conditions.expert_ids = on_device(ids);
  const auto routing = route(on_device(logits), rule, conditions);
  const auto plain = reference::choose(logits, {.top_k = 3});
  EXPECT_TRUE(
      routing.expert_ids.cpu().equal(torch::where(own.unsqueeze(1), plain.expert_ids, ids)));
}

// What is routed beside padding is routed as if the padding were not there.
TEST_P(ConditionsTest, PaddingCountsForNothing) {
  for (int64_t i = 0; i < effort(40); ++i) {
    const auto experts = random_.pick<int64_t>({1, 4, 8, 30, 128, 1280});
    const auto rule = random_simple_rule(random_, experts);
    const auto tokens = random_.pick<int64_t>({0, 1, 33});
    const double share = random_.pick<double>({0, 0.4, 1});
    SCOPED_TRACE(c10::str("T ", tokens, " E ", experts, " k ", rule.top_k, " padding ", share));
    const auto dtype = random_.pick<torch::Dtype>({torch::kFloat32, torch::kFloat64});
    const auto padding = random_.uniform({tokens}) < share;
    const auto kept = padding.logical_not();
    auto drawn = random_.normal({tokens, experts}, dtype);
    drawn.masked_fill_(padding.unsqueeze(1), std::nan(""));  // is not looked at
    const auto dweights = random_.normal({tokens, rule.top_k}, dtype);
    const auto dsum = random_.normal({experts}, dtype);

    const auto backward = [&](const Routing& routing, const torch::Tensor& of_weights) {
      ((routing.weights * on_device(of_weights)).sum() +
       (routing.probability_sum * on_device(dsum)).sum() + routing.squared_logsumexp_sum)
          .backward();
    };
    const auto plain_logits = on_device(drawn.index({kept})).requires_grad_();
    const auto plain = route(plain_logits, rule);
    backward(plain, dweights.index({kept}));

    const auto logits = on_device(drawn).requires_grad_();
    RoutingConditions conditions;
    conditions.padding_mask = on_device(padding);
    const auto routing = route(logits, rule, conditions);
    backward(routing, dweights);

    const auto kept_there = on_device(kept);
    const auto padding_there = on_device(padding);
    EXPECT_TRUE(routing.expert_ids.index({kept_there}).equal(plain.expert_ids));
    EXPECT_TRUE(routing.expert_ids.index({padding_there}).eq(-1).all().item<bool>());
    EXPECT_TRUE(routing.weights.index({padding_there}).eq(0).all().item<bool>());
    EXPECT_TRUE(routing.counts.equal(plain.counts));
    EXPECT_EQ(routing.num_tokens.item<int64_t>(), kept.sum().item<int64_t>());
    EXPECT_EQ(routing.first_nonfinite_token.item<int64_t>(), -1);
    const auto length = experts + tokens + 20;
    const double square = 1 + plain.squared_logsumexp_sum.item<double>();
    EXPECT_TRUE(close(routing.weights.index({kept_there}), plain.weights,
                      tolerance(dtype, length, rule.routing_scale)));
    EXPECT_TRUE(close(routing.probability_sum, plain.probability_sum,
                      tolerance(dtype, length, static_cast<double>(tokens))));
    EXPECT_TRUE(close(routing.squared_logsumexp_sum, plain.squared_logsumexp_sum,
                      tolerance(dtype, length, square)));
    EXPECT_TRUE(logits.grad().index({padding_there}).eq(0).all().item<bool>());
    EXPECT_TRUE(close(logits.grad().index({kept_there}), plain_logits.grad(),
                      tolerance(dtype, length, 100 * (1 + max_abs(plain_logits.grad())))));
  }
}

TEST_P(ConditionsTest, SequencesAreSummedEachByItself) {
  for (const auto& [sequences, length] :
       std::vector<std::pair<int64_t, int64_t>>{{1, 12}, {5, 7}, {3, 0}, {4, 1}}) {
    for (const auto score : {RouterScore::kSoftmax, RouterScore::kSqrtSoftplus}) {
      SCOPED_TRACE(c10::str(sequences, " of ", length));
      const int64_t tokens = sequences * length;
      RoutingRule rule;
      rule.top_k = 2;
      rule.router_score = score;
      RoutingConditions conditions;
      conditions.sequences = sequences;
      conditions.padding_mask = random_.uniform({tokens}) < 0.3;
      const auto drawn = random_.normal({tokens, 9});
      const auto dsums = random_.normal({sequences, 9});
      const auto dsum = random_.normal({9});
      const auto exact = drawn.clone().requires_grad_();
      const auto logits = on_device(drawn).requires_grad_();
      const auto routing = route(logits, rule, on_device(conditions));
      ((routing.sequences.probability_sum * on_device(dsums)).sum() +
       (routing.probability_sum * on_device(dsum)).sum())
          .backward();

      auto loss = torch::zeros({}, torch::kFloat64);
      for (int64_t s = 0; s < sequences; ++s) {
        const auto rows = torch::arange(s * length, (s + 1) * length);
        const auto kept = rows.index({conditions.padding_mask.index({rows}).logical_not()});
        const auto chosen = reference::choose(exact.index({kept}), {.top_k = 2, .score = score});
        const auto allowed = tolerance(torch::kFloat64, 100, 1 + static_cast<double>(length));
        EXPECT_TRUE(
            close(routing.sequences.probability_sum[s], chosen.probabilities.sum(0), allowed));
        EXPECT_TRUE(close(routing.sequences.counts[s],
                          chosen.expert_ids.reshape({-1}).bincount({}, 9), 0.0));
        EXPECT_EQ(routing.sequences.tokens[s].item<double>(), kept.size(0));
        loss = loss + (chosen.probabilities.sum(0) * (dsums[s] + dsum)).sum();
      }
      if (tokens > 0) {
        loss.backward();
        EXPECT_TRUE(close(logits.grad(), exact.grad(), tolerance(torch::kFloat64, 100, 10)));
      }
    }
  }
}

MoEOptions router_options(int64_t experts, int64_t top_k) {
  MoEOptions options;
  options.hidden_size = 12;
  options.expert_hidden_size = 4;
  options.num_experts = experts;
  options.top_k = top_k;
  return options;
}

TEST_P(ConditionsTest, ForcedRoutingIsBalancedOrDrawn) {
  for (const auto forced : {ForcedRouting::kBalanced, ForcedRouting::kRandom}) {
    auto options = router_options(8, 3);
    options.device = GetParam();
    options.forced_routing = forced;
    Router router(options);
    const auto x = on_device(random_.normal({401, 12}, torch::kFloat32));
    const auto routing = router->forward(x);
    const auto ids = routing.expert_ids.cpu();
    for (int64_t t = 0; t < ids.size(0); ++t) {
      const auto* row = ids[t].const_data_ptr<int64_t>();
      EXPECT_EQ(std::set<int64_t>(row, row + 3).size(), 3) << t;
    }
    const auto logits = x.matmul(router->weight.t()).detach().cpu().to(torch::kFloat64);
    RoutingRule rule;
    rule.top_k = 3;
    EXPECT_TRUE(
        close(routing.weights, weights_of(logits, ids, rule), tolerance(torch::kFloat32, 40, 4)));
    const auto counts = ids.reshape({-1}).bincount({}, 8);
    const int64_t spread = (counts.max() - counts.min()).item<int64_t>();
    if (forced == ForcedRouting::kBalanced) {
      EXPECT_LE(spread, 1);
    } else {
      // Each count has the mean 150 and a deviation below 10.
      EXPECT_GT(spread, 0);
      EXPECT_LT(spread, 160);
      EXPECT_FALSE(router->forward(x).expert_ids.cpu().equal(ids));
    }
    EXPECT_FALSE(routing.may_skip);
  }
}

TEST_P(ConditionsTest, ARouterInFp64RoundsOnlyItsWeights) {
  auto options = router_options(16, 4);
  options.device = GetParam();
  options.router_fp64 = true;
  options.expert_bias = true;
  options.router_score = RouterScore::kSigmoid;
  Router router(options);
  const auto x = on_device(random_.normal({50, 12}, torch::kBFloat16)).requires_grad_();
  const auto routing = router->forward(x);
  const auto logits =
      x.detach().to(torch::kFloat64).matmul(router->weight.detach().to(torch::kFloat64).t());
  const auto expected =
      reference::choose(logits.cpu(), {.top_k = 4, .score = RouterScore::kSigmoid});
  EXPECT_TRUE(routing.expert_ids.cpu().equal(expected.expert_ids));
  EXPECT_EQ(routing.weights.scalar_type(), torch::kFloat32);
  EXPECT_TRUE(close(routing.weights, expected.weights, unit_roundoff(torch::kFloat32)));
  routing.weights.square().sum().backward();
  EXPECT_EQ(router->weight.grad().scalar_type(), torch::kFloat32);
  EXPECT_TRUE(x.grad().isfinite().all().item<bool>());
}

// Whatever the gate, padding is not routed and its losses' sums are those without it.
TEST_P(ConditionsTest, GatesThatDrawLotsTakePadding) {
  for (const auto gate : {Gate::kNoisyTopK, Gate::kGShard, Gate::kSinkhorn}) {
    auto options = router_options(6, 2);
    options.device = GetParam();
    options.gate = gate;
    options.dtype = torch::kFloat64;
    Router router(options);
    const auto padding = random_.uniform({40}) < 0.4;
    const auto x = random_.normal({40, 12});
    RoutingConditions conditions;
    conditions.padding_mask = on_device(padding);
    for (const bool training : {true, false}) {
      router->train(training);
      const auto routing = router->forward(on_device(x), conditions);
      EXPECT_TRUE(routing.expert_ids.cpu().index({padding}).eq(-1).all().item<bool>());
      const auto assigned = routing.expert_ids.ge(0).sum().item<int64_t>();
      EXPECT_EQ(routing.counts.sum().item<int64_t>(), assigned);
      const auto tokens = padding.logical_not().sum().item<double>();
      if (gate == Gate::kGShard) {
        EXPECT_EQ(routing.first_counts.sum().item<double>(), tokens);
      } else if (gate == Gate::kNoisyTopK) {
        EXPECT_NEAR(routing.importance.sum().item<double>(), tokens, 1e-9);
        EXPECT_TRUE(routing.smooth_load.isfinite().all().item<bool>());
        EXPECT_LE(routing.smooth_load.max().item<double>(), tokens);
      }
      if (!training) {
        const auto plain = router->forward(on_device(x.index({padding.logical_not()})));
        EXPECT_TRUE(routing.counts.equal(plain.counts));
      }
    }
  }
}

TEST_P(ConditionsTest, RefusesWhatDoesNotFit) {
  const auto logits = on_device(torch::zeros({6, 4}));
  const auto refuse = [&](const std::function<void(RoutingConditions&)>& change,
                          const std::string& text) {
    RoutingConditions conditions;
    change(conditions);
    EXPECT_INPUT_ERROR(route(logits, {.top_k = 2}, conditions), text);
  };
  const auto there = torch::TensorOptions().device(GetParam());
  refuse(
      [&](auto& c) {
        c.expert_ids = torch::zeros({6, 3}, there.dtype(torch::kInt64));
      },
      "[6, 3]");
  refuse([&](auto& c) { c.expert_ids = torch::zeros({6, 2}, there); }, "expert_ids");
  refuse([&](auto& c) { c.padding_mask = torch::zeros({5}, there.dtype(torch::kBool)); }, "[5]");
  refuse([&](auto& c) { c.padding_mask = torch::zeros({6}, there); }, "padding_mask");
  refuse([&](auto& c) { c.sequences = 4; }, "6 tokens in 4 sequences");
}

}  // namespace
}  // namespace anabranch::test
