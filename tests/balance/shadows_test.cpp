// Experts whose weights travel in the place of their tokens. That a layer of them computes what the dense
// reference does is among the cases of moe_layer_test.
#include <anabranch/error.h>
#include <anabranch/moe_layer.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "balance/shadow_choice.h"
#include "communicator/agreement.h"
#include "support/devices.h"
#include "support/layer_case.h"
#include "support/tolerance.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

/// By the definition, with whole tensors: seconds of a step with these experts shadowed.
double seconds_with(const torch::Tensor& counts, const torch::Tensor& owner,
                    const torch::Tensor& shadowed, const StepCosts& costs) {
  const int64_t ranks = counts.size(0);
  const auto rank = torch::arange(ranks).unsqueeze(1);  // of the tokens
  const auto stays = (owner.unsqueeze(0) == rank).logical_or(shadowed.unsqueeze(0));
  const auto staying = counts * stays;
  const auto leaving = counts - staying;
  const auto arriving = torch::zeros({ranks}, torch::kLong).scatter_add_(0, owner, leaving.sum(0));
  const auto computed = staying.sum(1) + arriving;
  const auto moved = leaving.sum(1) + arriving;
  return static_cast<double>(computed.max().item<int64_t>()) * costs.assignment +
         static_cast<double>(moved.max().item<int64_t>()) * costs.row +
         static_cast<double>(shadowed.sum().item<int64_t>()) * costs.expert;
}

TEST(ShadowChoice, IsTheBestBeginningOfExpertsByFallingLoad) {
  Random random(test_seed());
  for (int64_t i = effort(200); i > 0; --i) {
    const ExpertPlacement placement{random.integer(1, 12), random.integer(1, 6)};
    const int64_t experts = placement.num_experts;
    const auto favour = torch::exp(random.normal({experts}) * random.uniform() * 3);
    const auto counts =
        (random.uniform({placement.num_ranks, experts}) * favour * 50).to(torch::kLong);
    const StepCosts costs{random.uniform(), random.uniform(), 60 * random.uniform()};
    std::vector<int64_t> owners;
    for (int64_t rank = 0; rank < placement.num_ranks; ++rank) {
      owners.insert(owners.end(), placement.local_experts(rank), rank);
    }
    const auto owner = torch::tensor(owners, torch::kLong);
    const auto by_load = counts.sum(0).argsort(/*stable=*/true, /*dim=*/0, /*descending=*/true);
    auto shadowed = torch::zeros({experts}, torch::kBool);
    const double without = seconds_with(counts, owner, shadowed, costs);
    auto best = shadowed.clone();
    double least = without;
    for (int64_t n = 0; n < experts; ++n) {
      shadowed[by_load[n].item<int64_t>()] = true;
      const double seconds = seconds_with(counts, owner, shadowed, costs);
      if (seconds < least) {
        least = seconds;
        best = shadowed.clone();
      }
    }
    if (least > 0.95 * without) {
      best.fill_(false);
      least = without;
    }
    const auto choice = choose_shadows(counts, placement, costs);
    SCOPED_TRACE(c10::str("counts ", counts));
    EXPECT_TRUE(torch::tensor(choice.experts, torch::kLong).equal(best.nonzero().flatten()));
    EXPECT_NEAR(choice.without.seconds, without, 1e-9 * (1 + without));
    EXPECT_NEAR(choice.with.seconds, least, 1e-9 * (1 + without));
  }
}

MoEOptions small_options() {
  MoEOptions options;
  options.hidden_size = options.expert_hidden_size = 4;
  options.num_experts = 5;
  options.top_k = 1;
  options.renormalize = false;
  options.bias = options.glu = true;
  options.balance = "shadow";
  options.device = device();
  return options;
}

constexpr int64_t kTokens = 200;

LayerCase one_takes_all(Random& random) {
  MoEOptions options = small_options();
  options.balance = "off";
  return draw_layer_case(random, world()->size(), options, kTokens, Skew::kOneExpert, Split::kEven,
                         /*routing_from_outside=*/true);
}

TEST(Shadows, AreThoseOfTheFullestExpertsAndAlikeOnAllRanks) {
  ANABRANCH_NEEDS_RANKS(2);
  Random random(test_seed());
  auto layer_case = one_takes_all(random);
  layer_case.options.balance = "shadow";
  auto layer = make_layer(layer_case, world());
  EXPECT_THAT(layer->explain(), ::testing::HasSubstr("no step yet"));
  run_step(layer, layer_case, layer_case.counts, world()->rank());
  EXPECT_THAT(layer->explain(), ::testing::HasSubstr("weights of experts"));
  EXPECT_THAT(layer->explain(), ::testing::HasSubstr("as assumed"));
  const auto texts = all_gather_strings(*world(), layer->explain());
  EXPECT_THAT(texts, ::testing::Each(texts.front()));

  layer_case.options.balance = "auto";
  auto measured = make_layer(layer_case, world());
  run_step(measured, layer_case, layer_case.counts, world()->rank());
  EXPECT_THAT(measured->explain(), ::testing::HasSubstr("as measured"));
}

/// What travels is the expert, once there and once back, and no row.
TEST(Shadows, SpareTheRowsTheirWay) {
  ANABRANCH_NEEDS_RANKS(2);
  Random random(test_seed());
  auto layer_case = one_takes_all(random);
  const auto bytes_of = [&](const std::string& balance) {
    layer_case.options.balance = balance;
    auto layer = make_layer(layer_case, world());
    world()->reset_traffic();
    run_step(layer, layer_case, layer_case.counts, world()->rank());
    auto bytes = torch::tensor(world()->traffic().bytes_sent);
    world()->all_reduce(bytes);
    return bytes.item<int64_t>();
  };
  EXPECT_LT(bytes_of("shadow"), bytes_of("off") / 2);
}

TEST(Shadows, AddTheirGradientsToMainGradients) {
  Random random(test_seed());
  auto layer_case = one_takes_all(random);
  const auto run = [&](const std::string& balance) {
    layer_case.options.balance = balance;
    auto layer = make_layer(layer_case, world());
    auto experts = layer->experts();
    experts->main_grad = {torch::zeros_like(experts->up_weight).detach(),
                          torch::zeros_like(experts->down_weight).detach()};
    run_step(layer, layer_case, layer_case.counts, world()->rank());
    EXPECT_FALSE(experts->up_weight.grad().defined());
    return experts->main_grad;
  };
  const WeightSums with = run("shadow");
  const WeightSums without = run("off");
  const auto limit = [&](const torch::Tensor& sum) {
    return tolerance_of_stages(torch::kFloat32, 4 * kTokens, 1 + max_abs(sum), 16);
  };
  EXPECT_TRUE(close(with.up, without.up, limit(without.up)));
  EXPECT_TRUE(close(with.down, without.down, limit(without.down)));
}

TEST(Shadows, AreRefusedWhereTheOptionIsNone) {
  auto options = small_options();
  options.balance = "on";
  EXPECT_THROW(MoELayer(options, world()), InputError);
}

}  // namespace
}  // namespace anabranch::test
