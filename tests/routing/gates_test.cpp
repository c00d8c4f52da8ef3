// Noisy top-k, GShard and Switch against plain formulas with the same random numbers, and the bias
// that balances without a loss.
#include <anabranch/router.h>
#include <gtest/gtest.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "reference/router.h"
#include "kernels/sinkhorn.h"
#include "routing/nonfinite_token.h"
#include "support/devices.h"
#include "support/random.h"
#include "support/thrown.h"
#include "support/tolerance.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

class GatesTest : public ::testing::Test {
 protected:
  static MoEOptions options(Gate gate, int64_t experts, int64_t top_k) {
    MoEOptions options;
    options.hidden_size = 12;
    options.expert_hidden_size = 4;
    options.num_experts = experts;
    options.top_k = top_k;
    options.gate = gate;
    options.dtype = torch::kFloat64;
    options.device = device();
    return options;
  }
  Random random_{test_seed()};
};

TEST_F(GatesTest, NoisyTopKEqualsItsFormulas) {
  for (const auto& [experts, top_k] :
       std::vector<std::pair<int64_t, int64_t>>{{6, 2}, {5, 1}, {4, 4}, {16, 3}}) {
    SCOPED_TRACE(c10::str("E ", experts, " k ", top_k));
    Router router(options(Gate::kNoisyTopK, experts, top_k));
    {
      const torch::NoGradGuard no_grad;
      router->noise_weight.copy_(0.3 * random_.normal({experts, 12}));
    }
    const auto x = on_device(random_.normal({40, 12})).requires_grad_();
    const auto dweights = on_device(random_.normal({40, top_k}));
    const auto dimportance = on_device(random_.normal({experts}));
    const auto dload = on_device(random_.normal({experts}));
    const auto loss_of = [&](const torch::Tensor& weights, const torch::Tensor& importance,
                             const torch::Tensor& load) {
      return (weights * dweights).sum() + (importance * dimportance).sum() + (load * dload).sum();
    };
    torch::manual_seed(test_seed());
    const auto routing = router->forward(x);
    loss_of(routing.weights, routing.importance, routing.smooth_load).backward();

    const auto x2 = x.detach().clone().requires_grad_();
    const auto gate = router->weight.detach().clone().requires_grad_();
    const auto noise = router->noise_weight.detach().clone().requires_grad_();
    const auto clean = x2.matmul(gate.t());
    const auto deviation = (1 + x2.matmul(noise.t()).exp()).log() + 0.01;
    torch::manual_seed(test_seed());
    const auto noisy = clean + torch::randn_like(clean) * deviation;
    const auto chosen = reference::choose(noisy, {.top_k = top_k});
    const auto dense = torch::zeros({40, experts}, noisy.options().requires_grad(false))
                           .scatter(1, chosen.expert_ids, chosen.weights);
    const auto load = reference::smooth_load(clean, noisy, deviation, top_k);
    loss_of(chosen.weights, dense.sum(0), load).backward();

    const auto allowed = tolerance(torch::kFloat64, 400, 40);
    EXPECT_TRUE(routing.expert_ids.equal(chosen.expert_ids));
    EXPECT_TRUE(close(routing.weights, chosen.weights, allowed));
    EXPECT_TRUE(close(routing.importance, dense.sum(0), allowed));
    EXPECT_TRUE(close(routing.smooth_load, load, allowed));
    // Slopes of Φ are 1 / deviation, 0.01 at least.
    const auto steep = 1e4 * allowed;
    EXPECT_TRUE(close(x.grad(), x2.grad(), steep));
    EXPECT_TRUE(close(router->weight.grad(), gate.grad(), steep));
    EXPECT_TRUE(close(router->noise_weight.grad(),
                      noise.grad().defined() ? noise.grad() : torch::zeros_like(noise), steep));
  }
}

TEST_F(GatesTest, NoisyTopKIsQuietInEvaluation) {
  Router router(options(Gate::kNoisyTopK, 6, 2));
  router->eval();
  const auto x = on_device(random_.normal({30, 12}));
  const auto routing = router->forward(x);
  const auto expected = route(x.matmul(router->weight.t()), 2, true);
  EXPECT_TRUE(routing.expert_ids.equal(expected.expert_ids));
  EXPECT_TRUE(routing.smooth_load.equal(expected.counts.to(torch::kFloat64)));
}

TEST_F(GatesTest, GShardTakesTheSecondExpertByChance) {
  Router router(options(Gate::kGShard, 8, 2));
  const auto x = on_device(random_.normal({500, 12})).requires_grad_();
  const auto dweights = on_device(random_.normal({500, 2}));
  torch::manual_seed(test_seed());
  const auto routing = router->forward(x);
  (routing.weights * dweights).sum().backward();

  const auto x2 = x.detach().clone().requires_grad_();
  const auto gates = torch::softmax(x2.matmul(router->weight.detach().t()), 1);
  const auto [best, ids] = gates.topk(2, 1);
  const auto second = best.select(1, 1) / best.sum(1);
  torch::manual_seed(test_seed());
  const auto taken = 2 * second.detach() > torch::rand_like(second.detach());
  const auto weights = torch::stack(
      {best.select(1, 0) / best.sum(1), torch::where(taken, second, torch::zeros_like(second))}, 1);
  (weights * dweights).sum().backward();

  EXPECT_TRUE(routing.may_skip);
  EXPECT_TRUE(routing.expert_ids.select(1, 0).equal(ids.select(1, 0)));
  EXPECT_TRUE(routing.expert_ids.select(1, 1).equal(
      torch::where(taken, ids.select(1, 1), torch::full_like(ids.select(1, 1), -1))));
  const auto allowed = tolerance(torch::kFloat64, 60, 20);
  EXPECT_TRUE(close(routing.weights, weights, allowed));
  EXPECT_TRUE(close(x.grad(), x2.grad(), allowed));
  EXPECT_TRUE(routing.first_counts.equal(ids.select(1, 0).bincount({}, 8)));
  EXPECT_TRUE(routing.counts.equal(ids.select(1, 0).bincount({}, 8) +
                                   ids.select(1, 1).index({taken}).bincount({}, 8)));
  // As many as their weights let expect: 500 draws of variance 1/4 at most, six deviations.
  EXPECT_NEAR(taken.sum().item<double>(), (2 * second).sum().item<double>(),
              6 * std::sqrt(500.0 / 4));
  EXPECT_GT(taken.sum().item<int64_t>(), 0);
  EXPECT_LT(taken.sum().item<int64_t>(), 500);
}

TEST_F(GatesTest, GShardTakesBothInEvaluation) {
  Router router(options(Gate::kGShard, 8, 2));
  router->eval();
  const auto routing = router->forward(on_device(random_.normal({50, 12})));
  EXPECT_FALSE(routing.may_skip);
  EXPECT_TRUE(routing.expert_ids.ge(0).all().item<bool>());
  EXPECT_EQ(routing.first_counts.sum().item<int64_t>(), 50);
}

// y = p · E(x) for the one expert of the largest p: no renormalisation (arXiv:2101.03961, eq. 2).
TEST_F(GatesTest, SwitchIsTopOneWithoutRenormalisation) {
  auto config = options(Gate::kTopK, 7, 1);
  config.renormalize = false;
  config.jitter = 0.1;
  Router router(config);
  const auto x = on_device(random_.normal({90, 12}));
  torch::manual_seed(test_seed());
  const auto routing = router->forward(x);
  torch::manual_seed(test_seed());
  const auto jittered = x * torch::empty_like(x).uniform_(0.9, 1.1);
  const auto [p, expert] = torch::softmax(jittered.matmul(router->weight.t()), 1).max(1, true);
  EXPECT_TRUE(routing.expert_ids.equal(expert));
  EXPECT_TRUE(close(routing.weights, p, tolerance(torch::kFloat64, 40, 4)));
}

TEST_F(GatesTest, SameSeedSameRouting) {
  for (const auto gate : {Gate::kNoisyTopK, Gate::kGShard}) {
    Router router(options(gate, 8, 2));
    const auto x = on_device(random_.normal({200, 12}));
    const auto ids = [&](uint64_t seed) {
      torch::manual_seed(seed);
      return router->forward(x).expert_ids;
    };
    EXPECT_TRUE(ids(5).equal(ids(5)));
    EXPECT_FALSE(ids(5).equal(ids(6)));
  }
}

/// Rows and columns of exp(logits) to equal sums in turn, as often as the gate does; multiplied out.
torch::Tensor scaled_by_sinkhorn(const torch::Tensor& logits) {
  const auto cost = logits.to(torch::kCPU, torch::kFloat64).exp();
  auto columns = torch::ones({cost.size(1)}, torch::kFloat64);
  auto rows = 1 / cost.sum(1);
  for (int64_t round = 0; round < kSinkhornRounds && cost.size(0) > 0; ++round) {
    const auto sums = columns * (cost * rows.unsqueeze(1)).sum(0);
    if ((sums / sums.mean() - 1).abs().max().item<double>() <= kSinkhornTolerance) break;
    columns = columns * sums.mean() / sums;
    rows = 1 / (cost * columns).sum(1);
  }
  return cost * columns * rows.unsqueeze(1);
}

TEST_F(GatesTest, SinkhornEqualsItsFormulas) {
  for (const auto score : {RouterScore::kSoftmax, RouterScore::kSigmoid}) {
    for (const auto& [tokens, experts, top_k] : std::vector<std::tuple<int64_t, int64_t, int64_t>>{
             {40, 6, 2}, {40, 5, 1}, {7, 4, 4}, {2, 3, 1}, {0, 4, 2}}) {
      SCOPED_TRACE(c10::str("T ", tokens, " E ", experts, " k ", top_k));
      auto of = options(Gate::kSinkhorn, experts, top_k);
      of.router_score = score;
      of.renormalize = false;
      Router router(of);
      const auto x = on_device(random_.normal({tokens, 12})).requires_grad_();
      const auto dweights = on_device(random_.normal({tokens, top_k}));
      const auto routing = router->forward(x);
      (routing.weights * dweights).sum().backward();

      const auto x2 = x.detach().clone().requires_grad_();
      const auto logits = x2.matmul(router->weight.detach().t());
      const auto wanted = std::get<1>(scaled_by_sinkhorn(logits.detach()).topk(top_k, 1));
      EXPECT_TRUE(routing.expert_ids.cpu().equal(wanted));
      const auto scores =
          score == RouterScore::kSoftmax ? torch::softmax(logits, 1) : torch::sigmoid(logits);
      const auto weights = scores.gather(1, routing.expert_ids);
      (weights * dweights).sum().backward();
      EXPECT_TRUE(close(routing.weights, weights, tolerance(torch::kFloat64, 40, 4)));
      EXPECT_TRUE(close(x.grad(), x2.grad(), tolerance(torch::kFloat64, 40 * experts, 100)));

      router->eval();
      EXPECT_TRUE(router->forward(x).expert_ids.cpu().equal(
          std::get<1>(logits.detach().topk(top_k, 1)).cpu()));
      router->train();
    }
  }
}

/// Logits that all prefer one expert, by more than tokens differ.
TEST_F(GatesTest, SinkhornBalances) {
  constexpr int64_t kTokens = 2000;
  constexpr int64_t kExperts = 8;
  auto of = options(Gate::kSinkhorn, kExperts, 1);
  of.renormalize = false;
  Router router(of);
  auto x = random_.normal({kTokens, 12});
  x.select(1, 0).fill_(1);
  {
    const torch::NoGradGuard no_grad;
    router->weight.select(1, 0).zero_();
    router->weight[3][0] = 6;
  }
  const auto counts = router->forward(on_device(x)).counts;
  EXPECT_LT(counts.max().item<int64_t>(), 2 * kTokens / kExperts);
  router->eval();
  EXPECT_EQ(router->forward(on_device(x)).counts[3].item<int64_t>(), kTokens);
}

/// It is refused as ever, and changes nobody else's choice.
TEST_F(GatesTest, SinkhornLeavesOutATokenThatIsNotFinite) {
  Router router(options(Gate::kSinkhorn, 6, 2));
  expect_token_left_out(router, random_.normal({30, 12}));
}

TEST_F(GatesTest, ExpertBiasFollowsTheLoad) {
  auto config = options(Gate::kTopK, 4, 1);
  config.expert_bias = true;
  Router router(config);
  ASSERT_EQ(router->named_buffers().size(), 1);
  EXPECT_TRUE(router->expert_bias.eq(0).all().item<bool>());
  EXPECT_FALSE(router->expert_bias.requires_grad());
  router->update_expert_bias(torch::tensor({10, 0, 5, 5}), 0.25);
  EXPECT_TRUE(
      router->expert_bias.cpu().equal(torch::tensor({-0.25, 0.25, 0.0, 0.0}, torch::kFloat64)));
  router->update_expert_bias(torch::tensor({0, 0, 0, 7}), 0.5);
  EXPECT_TRUE(
      router->expert_bias.cpu().equal(torch::tensor({0.25, 0.75, 0.5, -0.5}, torch::kFloat64)));
}

// Every update moves each bias by the rate towards the mean load, no more and no less. Scores lie between
// 0 and 1: after 1 / rate updates the biases can outweigh any preference of the gate, and the fullest
// expert has less on average than it began with.
TEST_F(GatesTest, ExpertBiasBalances) {
  constexpr int64_t kExperts = 8;
  constexpr double kRate = 0.01;
  constexpr int kUpdates = 100;
  auto config = options(Gate::kTopK, kExperts, 2);
  config.expert_bias = true;
  config.router_score = RouterScore::kSigmoid;
  Router router(config);
  auto x = random_.normal({1000, 12});
  x.select(1, 0).fill_(1);
  {
    const torch::NoGradGuard no_grad;
    router->weight.select(1, 0).copy_(torch::tensor({3.0, 2.0, 1.0, 0.0, 0.0, -1.0, -2.0, -3.0}));
  }
  const auto update = [&] {
    const auto counts = router->forward(on_device(x)).counts;
    const auto before = router->expert_bias.clone();
    router->update_expert_bias(counts, kRate);
    const auto total = counts.sum().item<int64_t>();
    for (int64_t e = 0; e < kExperts; ++e) {
      const auto load = kExperts * counts[e].item<int64_t>();
      const double step = load < total ? kRate : load > total ? -kRate : 0;
      EXPECT_EQ(router->expert_bias[e].item<double>(), before[e].item<double>() + step);
    }
    return counts.max().item<double>();
  };
  const double first = update();
  double later = 0;
  for (int i = 1; i < 2 * kUpdates; ++i) {
    const double fullest = update();
    later += i >= kUpdates ? fullest / kUpdates : 0;
  }
  EXPECT_LT(later, first);
}

TEST_F(GatesTest, RefusesWrongUpdatesOfTheBias) {
  auto config = options(Gate::kTopK, 4, 1);
  Router without(config);
  EXPECT_INPUT_ERROR(without->update_expert_bias(torch::zeros({4}), 0.1), "no bias");
  config.expert_bias = true;
  Router router(config);
  EXPECT_INPUT_ERROR(router->update_expert_bias(torch::zeros({5}), 0.1), "[5]");
  EXPECT_INPUT_ERROR(router->update_expert_bias(torch::Tensor(), 0.1), "load");
  EXPECT_INPUT_ERROR(router->update_expert_bias(torch::zeros({4}), -0.1), "rate");
  EXPECT_INPUT_ERROR(router->update_expert_bias(torch::zeros({4}), std::nan("")), "rate");
}

}  // namespace
}  // namespace anabranch::test
