// What balances by order statistics: experts that choose their tokens, and biases found as quantiles, against sorts of
// all that there is.
#include <anabranch/router.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "routing/nonfinite_token.h"
#include "support/devices.h"
#include "support/random.h"
#include "support/thrown.h"
#include "support/tolerance.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

constexpr int64_t kHidden = 12;

class ChoiceTest : public ::testing::Test {
 protected:
  static MoEOptions options(int64_t experts, int64_t top_k, torch::Dtype dtype) {
    MoEOptions options;
    options.hidden_size = kHidden;
    options.expert_hidden_size = 4;
    options.num_experts = experts;
    options.top_k = top_k;
    options.renormalize = false;
    options.dtype = dtype;
    options.device = device();
    return options;
  }
  /// Whole numbers, whose products are exact: tokens that are alike have equal scores.
  torch::Tensor whole(at::IntArrayRef sizes, torch::Dtype dtype) {
    return (random_.uniform(sizes) * 5).floor().sub(2).to(dtype);
  }
  static torch::Tensor score_of(const torch::Tensor& logits, RouterScore score) {
    if (score == RouterScore::kSoftmax) return torch::softmax(logits, 1);
    return score == RouterScore::kSigmoid ? torch::sigmoid(logits)
                                          : torch::log1p(logits.exp()).sqrt();
  }
  Random random_{test_seed()};
};

struct Case {
  int64_t length, sequences, experts, top_k;
  double padding;  // its share
};

/// [T, E], by a stable sort of each expert's tokens, a sequence after another.
torch::Tensor chosen_by_sorting(const torch::Tensor& scores, const torch::Tensor& padding,
                                const Case& of) {
  auto ids = torch::full({scores.size(0), of.experts}, -1, torch::kInt64);
  for (int64_t s = 0; s < of.sequences; ++s) {
    for (int64_t e = 0; e < of.experts; ++e) {
      std::vector<int64_t> tokens;
      for (int64_t t = s * of.length; t < (s + 1) * of.length; ++t) {
        if (!padding[t].item<bool>()) tokens.push_back(t);
      }
      std::stable_sort(tokens.begin(), tokens.end(), [&](int64_t a, int64_t b) {
        return scores[a][e].item<double>() > scores[b][e].item<double>();
      });
      const auto wanted = std::ceil(static_cast<double>(tokens.size() * of.top_k) /
                                    static_cast<double>(of.experts));
      for (size_t i = 0; i < std::min(tokens.size(), static_cast<size_t>(wanted)); ++i) {
        ids[tokens[i]][e] = e;
      }
    }
  }
  return ids;
}

TEST_F(ChoiceTest, ExpertsTakeTheirBestTokens) {
  constexpr RouterScore kScores[] = {RouterScore::kSoftmax, RouterScore::kSigmoid,
                                     RouterScore::kSqrtSoftplus};
  int round = 0;
  for (const Case& of : std::vector<Case>{{40, 1, 6, 2, 0},
                                          {13, 3, 5, 1, 0.3},
                                          {9, 2, 4, 4, 0.2},
                                          {7, 2, 16, 3, 0.5},
                                          {5, 2, 8, 2, 1},
                                          {1, 4, 3, 1, 0},
                                          {150, 1, 40, 6, 0.1},
                                          {0, 1, 4, 2, 0}}) {
    const bool renormalize = round % 2 == 1;
    const auto score = kScores[round % 3];
    const auto dtype = round % 4 == 2 ? torch::kFloat32 : torch::kFloat64;
    const bool ties = round++ % 2 == 0;
    const int64_t tokens = of.length * of.sequences;
    SCOPED_TRACE(
        c10::str("n ", of.length, " S ", of.sequences, " E ", of.experts, " k ", of.top_k));
    auto with = options(of.experts, of.top_k, dtype);
    with.gate = Gate::kExpertChoice;
    with.router_score = score;
    with.renormalize = renormalize;
    Router router(with);
    auto x = random_.normal({tokens, kHidden}).to(dtype);
    if (ties) {  // a few tokens, many times
      x = whole({3, kHidden}, dtype)
              .index_select(0, (random_.uniform({tokens}) * 3).to(torch::kInt64));
      const torch::NoGradGuard no_grad;
      router->weight.copy_(whole({of.experts, kHidden}, dtype));
    }
    RoutingConditions conditions;
    const auto padding = random_.uniform({tokens}) < of.padding;
    conditions.padding_mask = on_device(padding);
    conditions.sequences = of.sequences;
    const auto leaf = on_device(x.clone()).requires_grad_();
    const auto dweights = random_.normal({tokens, of.experts}).to(dtype);
    const auto routing = router->forward(leaf, conditions);
    (routing.weights * on_device(dweights)).sum().backward();

    const auto x2 = x.clone().requires_grad_();
    const auto logits = x2.matmul(router->weight.detach().cpu().t());
    const auto scores = score_of(logits, score);
    const auto by = score == RouterScore::kSoftmax ? scores.detach() : logits.detach();
    const auto ids = chosen_by_sorting(by, padding, of);
    EXPECT_TRUE(routing.expert_ids.cpu().equal(ids));
    EXPECT_TRUE(routing.counts.cpu().equal(ids.ge(0).sum(0)));
    EXPECT_TRUE(routing.may_skip);
    auto weights = scores * ids.ge(0).to(dtype);
    if (renormalize) weights = weights / (weights.sum(1, true) + 1e-20);
    (weights * dweights).sum().backward();
    const auto allowed = tolerance(dtype, 40 * of.experts, 100);
    EXPECT_TRUE(close(routing.weights, weights, allowed));
    EXPECT_TRUE(close(leaf.grad(), x2.grad(), 10 * allowed));
  }
}

/// Many blocks' worth of tokens, by logits of whole numbers: nothing is rounded, so that equal scores are equal on every
/// device. Of few different ones nearly all are equal to some other; of many each digit decides.
TEST_F(ChoiceTest, ExpertsTakeTheirShareOfLongSequences) {
  for (const auto& [tokens, experts, top_k, numbers] :
       std::vector<std::tuple<int64_t, int64_t, int64_t, double>>{
           {5000, 6, 2, 5}, {40000, 3, 1, 5}, {33000, 5, 2, 1e5}}) {
    SCOPED_TRACE(c10::str("T ", tokens, " E ", experts, " of ", numbers, " numbers"));
    auto with = options(experts, top_k, torch::kFloat32);
    with.gate = Gate::kExpertChoice;
    with.router_score = RouterScore::kSigmoid;
    Router router(with);
    {
      const torch::NoGradGuard no_grad;
      router->weight.copy_(whole({experts, kHidden}, torch::kFloat32));
    }
    const auto x =
        (random_.uniform({tokens, kHidden}) * numbers - numbers / 2).floor().to(torch::kFloat32);
    const auto ids = router->forward(on_device(x)).expert_ids.cpu();
    const auto logits = x.matmul(router->weight.detach().cpu().t());
    const auto order = std::get<1>(logits.sort(/*stable=*/true, 0, /*descending=*/true));
    const int64_t wanted = (tokens * top_k + experts - 1) / experts;
    for (int64_t e = 0; e < experts; ++e) {
      const auto best = std::get<0>(order.select(1, e).narrow(0, 0, wanted).sort());
      EXPECT_TRUE(ids.select(1, e).ge(0).nonzero().flatten().equal(best));
    }
  }
}

/// By nobody's scores but its own, its top_k best: the same whatever stands beside it.
TEST_F(ChoiceTest, InEvaluationATokenChoosesForItself) {
  auto with = options(8, 2, torch::kFloat64);
  with.gate = Gate::kExpertChoice;
  Router router(with);
  router->eval();
  const auto x = on_device(random_.normal({30, kHidden}));
  const auto routing = router->forward(x);
  const auto logits = x.matmul(router->weight.detach().t());
  EXPECT_TRUE(routing.expert_ids.equal(std::get<1>(logits.topk(2, 1))));
  EXPECT_TRUE(
      router->forward(x.narrow(0, 4, 3)).expert_ids.equal(routing.expert_ids.narrow(0, 4, 3)));
}

/// It takes nobody's place, and the step that has it is refused.
TEST_F(ChoiceTest, ATokenThatIsNotFiniteIsChosenByNobodyAndNamed) {
  auto with = options(6, 2, torch::kFloat64);
  with.gate = Gate::kExpertChoice;
  Router router(with);
  expect_token_left_out(router, random_.normal({30, kHidden}));
}

/// A choice that is given has as many places as it likes, as what was recorded of a step has.
TEST_F(ChoiceTest, AChoiceIsReplayed) {
  auto with = options(6, 2, torch::kFloat64);
  with.gate = Gate::kExpertChoice;
  Router router(with);
  const auto x = on_device(random_.normal({30, kHidden}));
  const auto recorded = router->forward(x);
  RoutingConditions conditions;
  conditions.expert_ids = recorded.expert_ids;
  for (const bool training : {true, false}) {
    router->train(training);
    const auto replayed = router->forward(x, conditions);
    EXPECT_TRUE(replayed.expert_ids.equal(recorded.expert_ids));
    EXPECT_TRUE(replayed.weights.equal(recorded.weights));
  }
  conditions.expert_ids = recorded.expert_ids.clone();  // half of the tokens' own choice
  conditions.expert_ids.slice(0, 0, 30, 2).fill_(kOwnChoice);
  router->train();
  EXPECT_TRUE(router->forward(x, conditions).expert_ids.equal(recorded.expert_ids));
  router->eval();
  const auto by_tokens = router->forward(x).expert_ids.slice(0, 0, 30, 2);
  const auto mixed = router->forward(x, conditions).expert_ids;
  EXPECT_TRUE(mixed.slice(0, 0, 30, 2).narrow(1, 0, 2).equal(by_tokens));
  EXPECT_TRUE(mixed.slice(0, 0, 30, 2).narrow(1, 2, 4).eq(-1).all().item<bool>());
  EXPECT_TRUE(mixed.slice(0, 1, 30, 2).equal(recorded.expert_ids.slice(0, 1, 30, 2)));
}

/// [E] by a sort of what each expert's bias would have had to be for each token.
torch::Tensor quantiles_by_sorting(const torch::Tensor& scores, const torch::Tensor& bias,
                                   const torch::Tensor& padding, int64_t top_k) {
  const int64_t experts = scores.size(1);
  std::vector<std::vector<double>> wanted(experts);
  for (int64_t t = 0; t < scores.size(0); ++t) {
    if (padding[t].item<bool>()) continue;
    std::vector<double> choices;
    for (int64_t e = 0; e < experts; ++e) {
      choices.push_back(scores[t][e].item<double>() + bias[e].item<double>());
    }
    std::sort(choices.begin(), choices.end(), std::greater<>());
    for (int64_t e = 0; e < experts; ++e) {
      wanted[e].push_back(choices[top_k] - scores[t][e].item<double>());
    }
  }
  auto found = torch::zeros({experts}, torch::kFloat64);
  for (int64_t e = 0; e < experts; ++e) {
    auto& of_expert = wanted[e];
    std::sort(of_expert.begin(), of_expert.end());
    const auto place = static_cast<double>(of_expert.size() * top_k) / static_cast<double>(experts);
    found[e] = of_expert[static_cast<size_t>(std::ceil(place)) - 1];
  }
  return found - found.mean();
}

TEST_F(ChoiceTest, QuantileBalancingEqualsASort) {
  int round = 0;
  for (const auto& [tokens, experts, top_k, share] :
       std::vector<std::tuple<int64_t, int64_t, int64_t, double>>{
           {200, 8, 2, 0.0}, {77, 5, 1, 0.3}, {300, 40, 6, 0.1}, {33, 3, 2, 0.0}}) {
    SCOPED_TRACE(c10::str("T ", tokens, " E ", experts, " k ", top_k));
    const auto dtype = round % 2 == 0 ? torch::kFloat64 : torch::kFloat32;
    const auto score = round++ < 2 ? RouterScore::kSigmoid : RouterScore::kSoftmax;
    auto with = options(experts, top_k, dtype);
    with.renormalize = true;
    with.expert_bias = true;
    with.expert_bias_update = BiasUpdate::kQuantile;
    with.router_score = score;
    Router router(with);
    const auto bias = 0.3 * random_.normal({experts});
    router->expert_bias.copy_(bias);
    const auto x = random_.normal({tokens, kHidden}).to(dtype);
    RoutingConditions conditions;
    const auto padding = random_.uniform({tokens}) < share;
    conditions.padding_mask = on_device(padding);
    const auto routing = router->forward(on_device(x), conditions);
    const auto kept = padding.logical_not().sum();
    EXPECT_TRUE(routing.bias_histogram.cpu().sum(1).eq(kept).all().item<bool>());
    const auto before =
        router->expert_bias.cpu().to(torch::kFloat64, /*non_blocking=*/false, /*copy=*/true);
    const auto logits = x.matmul(router->weight.detach().cpu().t());
    const auto wanted = quantiles_by_sorting(score_of(logits, score), before, padding, top_k);

    router->update_expert_bias(routing.bias_histogram, 1);
    // An order statistic is in the bin that is found, and so is what is found; their means are as near.
    const double width = (2 + (before.max() - before.min()).item<double>()) / kBiasBins;
    EXPECT_LT((router->expert_bias.cpu() - wanted).abs().max().item<double>(), 2.01 * width);
    router->expert_bias.copy_(before);
    router->update_expert_bias(routing.bias_histogram, 0.25);
    EXPECT_LT(
        (router->expert_bias.cpu() - (0.75 * before + 0.25 * wanted)).abs().max().item<double>(),
        0.51 * width);

    router->eval();
    EXPECT_FALSE(router->forward(on_device(x)).bias_histogram.defined());
  }
}

/// Of no tokens, of padding alone and with all experts for every token nothing is learned.
TEST_F(ChoiceTest, QuantilesOfNothingLeaveTheBiases) {
  for (const auto& [tokens, top_k] :
       std::vector<std::pair<int64_t, int64_t>>{{0, 2}, {9, 2}, {9, 4}}) {
    auto with = options(4, top_k, torch::kFloat64);
    with.expert_bias = true;
    with.expert_bias_update = BiasUpdate::kQuantile;
    Router router(with);
    router->expert_bias.copy_(random_.normal({4}));
    const auto before = router->expert_bias.clone();
    RoutingConditions conditions;
    if (top_k < 4) conditions.padding_mask = on_device(torch::ones({tokens}, torch::kBool));
    const auto routing = router->forward(on_device(random_.normal({tokens, kHidden})), conditions);
    EXPECT_EQ(routing.bias_histogram.sum().item<int64_t>(), 0);
    router->update_expert_bias(routing.bias_histogram, 1);
    EXPECT_TRUE(router->expert_bias.equal(before));
  }
}

/// The same tokens again and again, of which one expert would have nearly all.
TEST_F(ChoiceTest, QuantilesBalanceInAFewSteps) {
  constexpr int64_t kTokens = 2000;
  constexpr int64_t kExperts = 8;
  auto with = options(kExperts, 2, torch::kFloat64);
  with.renormalize = true;
  with.router_score = RouterScore::kSigmoid;
  with.expert_bias = true;
  with.expert_bias_update = BiasUpdate::kQuantile;
  Router router(with);
  auto x = random_.normal({kTokens, kHidden});
  x.select(1, 0).fill_(1);
  {
    const torch::NoGradGuard no_grad;
    router->weight.select(1, 0).copy_((torch::arange(kExperts) - 4) / 4.0);
  }
  const double mean = 2.0 * kTokens / kExperts;
  const auto step = [&] {
    const auto routing = router->forward(on_device(x));
    router->update_expert_bias(routing.bias_histogram, 1);
    return routing.counts.max().item<double>() / mean;
  };
  EXPECT_GT(step(), 2);
  double last = 0;
  for (int i = 0; i < 20; ++i) last = step();
  EXPECT_LT(last, 1.25);
}

TEST_F(ChoiceTest, RefusesWhatDoesNotFit) {
  auto with = options(4, 2, torch::kFloat64);
  with.expert_bias = true;
  with.expert_bias_update = BiasUpdate::kQuantile;
  Router router(with);
  EXPECT_INPUT_ERROR(router->update_expert_bias(torch::zeros({4}), 1), "histogram");
  EXPECT_INPUT_ERROR(router->update_expert_bias(torch::zeros({4, kBiasBins}), 1.5), "rate");
  RoutingConditions conditions;
  conditions.bias_histogram = true;
  EXPECT_INPUT_ERROR(route(on_device(random_.normal({3, 4})), RoutingRule{.top_k = 2}, conditions),
                     "bias_histogram");
}

}  // namespace
}  // namespace anabranch::test
