#include <anabranch/error.h>
#include <anabranch/router.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "reference/dense_moe.h"
#include "routing/gate.h"
#include "routing/route.h"
#include "support/devices.h"
#include "support/random.h"
#include "support/thrown.h"
#include "support/tolerance.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

class RouteTest : public ::testing::TestWithParam<torch::Device> {
 protected:
  torch::Tensor on_device(const torch::Tensor& tensor) const { return tensor.to(GetParam()); }
  Random random_{test_seed()};
};
INSTANTIATE_TEST_SUITE_P(Devices, RouteTest, ::testing::ValuesIn(devices()),
                         [](const auto& info) { return device_name(info.param); });

// The k-th and the next probability of every token are further apart than rounding can bridge.
torch::Tensor clear_logits(Random& random, int64_t tokens, int64_t num_experts, double scale) {
  auto logits = scale * random.normal({tokens, num_experts});
  auto ranks = std::get<1>(logits.sort(1)).argsort(1, /*descending=*/false).to(torch::kFloat64);
  return (logits + 1e-3 * ranks).to(torch::kFloat32).to(torch::kFloat64);
}

// Small whole numbers: every sum is exact, however many tokens there are and in whatever order.
TEST_P(RouteTest, TheGatesGradientLosesNoToken) {
  const auto whole = [&](at::IntArrayRef sizes, torch::Dtype dtype) {
    return on_device((random_.uniform(sizes) * 5).floor().sub(2).to(dtype));
  };
  for (const int64_t tokens : {0, 1, 4095, 4096, 8193, 8195, 12300}) {
    for (const auto dtype : {torch::kBFloat16, torch::kFloat16, torch::kFloat32}) {
      SCOPED_TRACE(c10::str("T ", tokens, " ", to_string(dtype)));
      const auto x = whole({tokens, 40}, dtype);
      const auto dlogits = whole({tokens, 16}, torch::kFloat32);
      const auto weight = whole({16, 40}, torch::kFloat32).requires_grad_();
      gate_logits(x, weight).backward(dlogits);
      const auto expected = dlogits.cpu().to(torch::kFloat64).t().mm(x.cpu().to(torch::kFloat64));
      EXPECT_TRUE(weight.grad().cpu().to(torch::kFloat64).equal(expected));
    }
  }
}

// Bit for bit: gate and routing in one step of autograd are the two of them.
TEST_P(RouteTest, RowsAreRoutedAsTheirLogitsAre) {
  for (int64_t i = 0; i < effort(40); ++i) {
    const auto num_experts = random_.pick<int64_t>({1, 3, 8, 64, 130});
    const auto tokens = random_.pick<int64_t>({0, 1, 65, 4100});
    const auto dtype =
        random_.pick<torch::Dtype>({torch::kBFloat16, torch::kFloat32, torch::kFloat64});
    const auto gate_type = dtype == torch::kFloat64 ? torch::kFloat64 : torch::kFloat32;
    RoutingRule rule;
    rule.top_k = random_.integer(1, std::min<int64_t>(num_experts, 4));
    rule.renormalize = random_.chance();
    rule.router_score = random_.chance() ? RouterScore::kSigmoid : RouterScore::kSoftmax;
    SCOPED_TRACE(c10::str("T ", tokens, " E ", num_experts, " k ", rule.top_k, " ",
                          to_string(dtype),
                          rule.router_score == RouterScore::kSigmoid ? " sigmoid" : " softmax"));
    const auto bias =
        random_.chance() ? on_device(random_.normal({num_experts}, gate_type)) : torch::Tensor();
    const auto rows = on_device(random_.normal({tokens, 40}).to(dtype));
    const auto gate = on_device(random_.normal({num_experts, 40}, gate_type));
    const auto dweights = on_device(random_.normal({tokens, rule.top_k}, gate_type));
    const auto dsum = on_device(random_.normal({num_experts}, gate_type));
    const bool x_wanted = random_.chance(0.8);
    const auto run = [&](const auto& route_them) {
      const auto x = rows.detach().clone().requires_grad_(x_wanted);
      const auto weight = gate.detach().clone().requires_grad_();
      const Routing routing = route_them(x, weight);
      ((routing.weights * dweights).sum() + (routing.probability_sum * dsum).sum() +
       0.5 * routing.squared_logsumexp_sum)
          .backward();
      return std::vector<torch::Tensor>{routing.expert_ids,
                                        routing.weights,
                                        routing.counts,
                                        routing.probability_sum,
                                        routing.squared_logsumexp_sum,
                                        routing.first_nonfinite_token,
                                        weight.grad(),
                                        x_wanted ? x.grad() : rows};
    };
    RoutingConditions given;
    given.expert_bias = bias;
    const auto found =
        run([&](const auto& x, const auto& weight) { return route_rows(x, weight, rule, given); });
    const auto expected = run([&](const auto& x, const auto& weight) {
      return route(gate_logits(x, weight), rule, bias);
    });
    for (size_t t = 0; t < found.size(); ++t) {
      EXPECT_TRUE(found[t].equal(expected[t])) << "tensor " << t;
    }
  }
}

// Of weights and gradients of any size: fp16 alone would lose those below 2⁻²⁴.
TEST_P(RouteTest, TheGateOfRowsOf16BitsIsAsOfFp32) {
  constexpr int64_t kTokens = 50, kHidden = 300, kExperts = 24;
  for (const auto dtype : {torch::kBFloat16, torch::kFloat16}) {
    for (const double size : {1e-7, 1e-2, 30.0}) {
      SCOPED_TRACE(c10::str(to_string(dtype), " of ", size));
      const auto rows = random_.normal({kTokens, kHidden}, dtype);
      const auto weights = (size * random_.normal({kExperts, kHidden})).to(torch::kFloat32);
      const auto dlogits = (1e-3 * random_.normal({kTokens, kExperts})).to(torch::kFloat32);
      const auto x64 = rows.to(torch::kFloat64).requires_grad_();
      const auto weight64 = weights.to(torch::kFloat64).requires_grad_();
      const auto logits64 = x64.mm(weight64.t());
      logits64.backward(dlogits.to(torch::kFloat64));

      const auto x = on_device(rows).requires_grad_();
      const auto weight = on_device(weights).requires_grad_();
      const auto logits = gate_logits(x, weight);
      logits.backward(on_device(dlogits));
      const auto magnitude = x64.detach().abs().mm(weight64.detach().abs().t());
      EXPECT_EQ(logits.scalar_type(), torch::kFloat32);
      EXPECT_TRUE(close(logits, logits64, tolerance(torch::kFloat32, 3 * kHidden, magnitude)));
      const auto d64 = dlogits.to(torch::kFloat64).abs();
      EXPECT_TRUE(close(weight.grad(), weight64.grad(),
                        tolerance(torch::kFloat32, 3 * kTokens, d64.t().mm(x64.detach().abs()))));
      // Besides the rounding of what is stored, of fp16 also that to its least number.
      const auto of_row = d64.mm(weight64.detach().abs());
      const double least = dtype == torch::kFloat16 ? std::exp2(-25) : 0;
      EXPECT_TRUE(close(x.grad(), x64.grad(), tolerance(dtype, 3 * kExperts, of_row) + least));
    }
  }
}

TEST_P(RouteTest, EqualsReferenceForwardAndBackward) {
  const auto cases = effort(60);
  for (int64_t i = 0; i < cases; ++i) {
    const auto num_experts = random_.pick<int64_t>({1, 2, 3, 5, 8, 16, 64, 257});
    const auto top_k = random_.integer(1, std::min<int64_t>(num_experts, 9));
    const auto tokens = random_.pick<int64_t>({0, 1, 2, 7, 64, 129});
    const bool renormalize = random_.chance();
    const auto dtype = random_.pick<torch::Dtype>({torch::kFloat32, torch::kFloat64});
    SCOPED_TRACE(c10::str("T ", tokens, " E ", num_experts, " k ", top_k, " renormalize ",
                          renormalize, " ", to_string(dtype)));
    const auto exact = clear_logits(random_, tokens, num_experts, random_.pick<double>({0.1, 3}));
    const auto dweights = random_.normal({tokens, top_k});
    const auto dsum = random_.normal({num_experts});
    const auto dsquare = random_.normal({});

    const auto logits64 = exact.clone().requires_grad_();
    const auto expected = reference::top_k_of_softmax(logits64, top_k, renormalize);
    const auto log_sum = logits64.logsumexp(1);
    ((expected.weights * dweights).sum() + (expected.probabilities.sum(0) * dsum).sum() +
     log_sum.square().sum() * dsquare)
        .backward();

    const auto logits = on_device(exact.to(dtype)).requires_grad_();
    const auto routing = route(logits, top_k, renormalize);
    ((routing.weights * on_device(dweights.to(dtype))).sum() +
     (routing.probability_sum * on_device(dsum.to(dtype))).sum() +
     routing.squared_logsumexp_sum * on_device(dsquare.to(dtype)))
        .backward();

    // exp's argument carries the logits' rounding: a relative error of about max|logit| · u.
    const auto length = num_experts + 8 + static_cast<int64_t>(2 * max_abs(exact));
    EXPECT_TRUE(routing.expert_ids.cpu().equal(expected.expert_ids));
    EXPECT_EQ(routing.weights.scalar_type(), dtype);
    EXPECT_TRUE(close(routing.weights, expected.weights, tolerance(dtype, length, 1.0)));
    EXPECT_TRUE(
        routing.counts.cpu().equal(expected.expert_ids.reshape({-1}).bincount({}, num_experts)));
    EXPECT_TRUE(close(routing.probability_sum, expected.probabilities.sum(0),
                      tolerance(dtype, length + tokens, static_cast<double>(tokens))));
    const auto square_sum = log_sum.square().sum();
    EXPECT_TRUE(close(routing.squared_logsumexp_sum, square_sum,
                      tolerance(dtype, length + tokens, square_sum.item<double>() + tokens)));
    EXPECT_EQ(routing.first_nonfinite_token.item<int64_t>(), -1);
    // Each gradient is a difference of terms no larger than these.
    const double magnitude =
        2 * max_abs(dweights) + 2 * max_abs(dsum) + 2 * max_abs(log_sum) * max_abs(dsquare);
    EXPECT_TRUE(
        close(logits.grad(), logits64.grad(), tolerance(dtype, 2 * length + top_k, magnitude)));
  }
}

TEST_P(RouteTest, TiesGoToTheLowestExpert) {
  // Few distinct values, so that nearly every choice is between equals.
  for (const int64_t num_experts : {2, 5, 16, 33, 128}) {
    const auto logits = (random_.uniform({100, num_experts}) * 3).floor().to(torch::kFloat32);
    for (int64_t top_k = 1; top_k <= std::min<int64_t>(num_experts, 8); ++top_k) {
      const auto routing = route(on_device(logits), top_k, true);
      const auto expected =
          reference::top_k_of_softmax(logits.to(torch::kFloat64), top_k, true).expert_ids;
      EXPECT_TRUE(routing.expert_ids.cpu().equal(expected))
          << "E " << num_experts << " k " << top_k;
    }
  }
}

TEST_P(RouteTest, EqualLogitsChooseTheFirstExperts) {
  const auto routing = route(on_device(torch::zeros({3, 7})), 4, true);
  EXPECT_TRUE(routing.expert_ids.cpu().equal(torch::arange(4).expand({3, 4})));
  EXPECT_TRUE(close(routing.weights, torch::full({3, 4}, 0.25), tolerance(torch::kFloat32, 8, 1)));
}

TEST_P(RouteTest, LargeLogitsNeitherOverflowNorVanish) {
  const auto logits = torch::tensor({{3e4, -3e4, 3e4 - 1}, {-3e4, -3e4, -3e4}}, torch::kFloat32);
  const auto routing = route(on_device(logits), 2, true);
  EXPECT_TRUE(routing.expert_ids.cpu().equal(torch::tensor({{0, 2}, {0, 1}})));
  const double first = 1 / (1 + std::exp(-1.0));
  EXPECT_TRUE(close(routing.weights, torch::tensor({{first, 1 - first}, {0.5, 0.5}}),
                    tolerance(torch::kFloat32, 8, 1)));
  const auto squares = (routing.squared_logsumexp_sum.to(torch::kFloat64)).item<double>();
  const double expected =
      std::pow(3e4 + std::log1p(std::exp(-1.0)), 2) + std::pow(-3e4 + std::log(3.0), 2);
  EXPECT_NEAR(squares, expected, tolerance(torch::kFloat32, 8, expected));
}

TEST_P(RouteTest, NamesTheFirstTokenThatIsNotFinite) {
  for (const double bad : {std::nan(""), kInfinity, -kInfinity}) {
    auto logits = random_.normal({9, 5}, torch::kFloat32);
    const auto clean = route(on_device(logits), 2, true);
    logits[7][0] = bad;
    logits[4][3] = bad;
    const auto routing = route(on_device(logits), 2, true);
    EXPECT_EQ(routing.first_nonfinite_token.item<int64_t>(), 4) << bad;
    EXPECT_EQ(clean.first_nonfinite_token.item<int64_t>(), -1);
    // Its neighbours are routed as without it.
    EXPECT_TRUE(identical(routing.expert_ids.slice(0, 0, 4), clean.expert_ids.slice(0, 0, 4)));
    EXPECT_TRUE(identical(routing.weights.slice(0, 0, 4), clean.weights.slice(0, 0, 4)));
  }
}

TEST_P(RouteTest, TwoRunsAgreeBitForBit) {
  const auto exact = random_.normal({300, 24}, torch::kFloat32);
  const auto dweights = random_.normal({300, 3}, torch::kFloat32);
  const auto once = [&] {
    const auto logits = on_device(exact).clone().requires_grad_();
    const auto routing = route(logits, 3, true);
    ((routing.weights * on_device(dweights)).sum() + routing.squared_logsumexp_sum +
     routing.probability_sum.square().sum())
        .backward();
    return std::vector<torch::Tensor>{routing.expert_ids, routing.weights, routing.probability_sum,
                                      routing.squared_logsumexp_sum, logits.grad()};
  };
  const auto first = once();
  const auto second = once();
  for (size_t i = 0; i < first.size(); ++i) {
    EXPECT_TRUE(identical(first[i], second[i])) << "result " << i;
  }
}

TEST_P(RouteTest, RefusesWrongLogits) {
  const auto logits = on_device(torch::zeros({4, 6}));
  EXPECT_INPUT_ERROR(route(logits, 0, true), "top_k");
  EXPECT_INPUT_ERROR(route(logits, -1, true), "top_k");
  EXPECT_INPUT_ERROR(route(logits, 7, true), "top_k");
  EXPECT_INPUT_ERROR(route(logits.to(torch::kBFloat16), 1, true), "BFloat16");
  EXPECT_INPUT_ERROR(route(logits.to(torch::kInt64), 1, true), "Long");
  EXPECT_INPUT_ERROR(route(logits[0], 1, true), "[6]");
  EXPECT_INPUT_ERROR(route(torch::Tensor(), 1, true), "logits");
  EXPECT_INPUT_ERROR(route(torch::zeros({4, 6}, torch::kMeta), 1, true), "meta");
}

TEST_P(RouteTest, AcceptsStridedLogits) {
  const auto logits = on_device(random_.normal({6, 10}, torch::kFloat32));
  const auto transposed = logits.t().contiguous().t();
  ASSERT_FALSE(transposed.is_contiguous());
  EXPECT_TRUE(identical(route(transposed, 2, true).weights, route(logits, 2, true).weights));
}

class RouterTest : public ::testing::Test {
 protected:
  static MoEOptions options(int64_t hidden, int64_t num_experts, int64_t top_k) {
    MoEOptions options;
    options.hidden_size = hidden;
    options.expert_hidden_size = 4;
    options.num_experts = num_experts;
    options.top_k = top_k;
    options.device = device();
    return options;
  }
  Random random_{test_seed()};
};

TEST_F(RouterTest, EqualsReferenceForEveryInputType) {
  for (const auto dtype : all_dtypes()) {
    SCOPED_TRACE(to_string(dtype));
    auto config = options(48, 6, 2);
    config.dtype = dtype;
    Router router(config);
    const auto gate_type = dtype == torch::kFloat64 ? torch::kFloat64 : torch::kFloat32;
    ASSERT_EQ(router->weight.scalar_type(), gate_type);
    ASSERT_EQ(router->weight.sizes(), torch::IntArrayRef({6, 48}));

    const auto x = on_device(random_.normal({33, 48}, dtype)).requires_grad_();
    const auto routing = router->forward(x);
    const auto dweights = random_.normal({33, 2});
    (routing.weights * on_device(dweights.to(gate_type))).sum().backward();

    const auto x64 = x.detach().cpu().to(torch::kFloat64).requires_grad_();
    const auto gate64 = router->weight.detach().cpu().to(torch::kFloat64).requires_grad_();
    const auto expected = reference::top_k_of_softmax(x64.matmul(gate64.t()), 2, true);
    (expected.weights * dweights).sum().backward();

    const double logit_magnitude = max_abs(x64.detach().abs().matmul(gate64.detach().abs().t()));
    EXPECT_TRUE(routing.expert_ids.cpu().equal(expected.expert_ids));
    EXPECT_TRUE(close(routing.weights, expected.weights,
                      tolerance(gate_type, 48 + 16, 1 + logit_magnitude)));
    EXPECT_EQ(x.grad().scalar_type(), dtype);
    const double scale = max_abs(dweights) * (1 + logit_magnitude);
    EXPECT_TRUE(close(x.grad(), x64.grad(),
                      tolerance(gate_type, 48 + 16, 2 * scale * max_abs(gate64)) +
                          tolerance(dtype, 6, max_abs(x64.grad()))));
    EXPECT_TRUE(close(router->weight.grad(), gate64.grad(),
                      tolerance(gate_type, 48 + 16 + 33, 2 * scale * 33 * max_abs(x64))));
  }
}

TEST_F(RouterTest, InitialGateDependsOnTheSeedOnly) {
  auto config = options(32, 8, 2);
  config.seed = 7;
  const auto first = Router(config)->weight.detach().clone();
  torch::manual_seed(12345);
  EXPECT_TRUE(identical(Router(config)->weight.detach(), first));
  config.seed = 8;
  EXPECT_FALSE(Router(config)->weight.detach().equal(first));
  EXPECT_GT(first.std().item<double>(), 0);
  EXPECT_TRUE(first.isfinite().all().item<bool>());
}

// One input of 1 and a gate of (1, 0): the logits are (noise, 0), so that the weights tell the noise.
TEST_F(RouterTest, JitterMultipliesTheGateInputInTrainingOnly) {
  auto config = options(1, 2, 2);
  config.jitter = 0.2;
  config.renormalize = false;
  Router router(config);
  {
    const torch::NoGradGuard no_grad;
    router->weight.copy_(torch::tensor({{1.0F}, {0.0F}}));
  }
  const auto x = on_device(torch::ones({4000, 1}));
  const auto noise = [&] {
    const auto routing = router->forward(x);
    return routing.weights.select(1, 0).detach().to(torch::kFloat64).logit();
  };
  router->train();
  const auto first = noise();
  const double slack = 1e-5;
  EXPECT_GE(first.min().item<double>(), 0.8 - slack);
  EXPECT_LE(first.max().item<double>(), 1.2 + slack);
  // Uniform on [0.8, 1.2]: deviation 0.4/√12; six standard errors.
  const double deviation = 0.4 / std::sqrt(12.0);
  EXPECT_NEAR(first.mean().item<double>(), 1.0, 6 * deviation / std::sqrt(4000.0));
  EXPECT_NEAR(first.std().item<double>(), deviation, 6 * deviation / std::sqrt(4000.0));
  EXPECT_FALSE(noise().equal(first));
  router->eval();
  EXPECT_LT((noise() - 1).abs().max().item<double>(), slack);
}

TEST_F(RouterTest, RefusesWrongInput) {
  Router router(options(16, 4, 2));
  EXPECT_INPUT_ERROR(router->forward(on_device(torch::zeros({3, 15}))), "16");
  EXPECT_INPUT_ERROR(router->forward(on_device(torch::zeros({3, 16}, torch::kInt32))), "Int");
  EXPECT_INPUT_ERROR(router->forward(torch::zeros({3, 16}, torch::kMeta)), "meta");
  EXPECT_INPUT_ERROR(router->forward(torch::Tensor()), "x");
}

}  // namespace
}  // namespace anabranch::test
