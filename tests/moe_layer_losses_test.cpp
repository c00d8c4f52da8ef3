// What a layer adds around its experts: latent projections, padding, losses by sequence and attached ones, at
// any number of ranks.
#include <anabranch/error.h>
#include <anabranch/gradients.h>
#include <anabranch/moe_layer.h>
#include <gtest/gtest.h>
#include <torch/nn/functional/linear.h>

#include "support/devices.h"
#include "support/random.h"
#include "support/tolerance.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

constexpr int64_t kHidden = 12;
constexpr int64_t kExperts = 8;
constexpr int64_t kTopK = 2;

class LayerLossesTest : public ::testing::Test {
 protected:
  static MoEOptions options() {
    MoEOptions options;
    options.hidden_size = kHidden;
    options.expert_hidden_size = 7;
    options.num_experts = kExperts;
    options.top_k = kTopK;
    options.activation = Activation::kSilu;
    options.glu = true;
    options.dtype = torch::kFloat64;
    options.device = device();
    options.seed = 3;
    return options;
  }
  /// Sequences of all ranks, and which are this one's.
  torch::Tensor own(const torch::Tensor& whole) const {
    const int64_t ranks = world()->size();
    const int64_t rank = world()->rank();
    const int64_t size = whole.size(0);
    return on_device(whole.slice(0, size * rank / ranks, size * (rank + 1) / ranks).contiguous());
  }
  Random random_{test_seed()};
};

TEST_F(LayerLossesTest, ExpertsOfALatentLayerSeeProjectedRows) {
  auto latent_options = options();
  latent_options.latent_size = 5;
  MoELayer latent(latent_options, world());
  auto inner_options = options();
  inner_options.hidden_size = 5;
  MoELayer inner(inner_options, world());
  {
    const torch::NoGradGuard no_grad;
    inner->experts()->up_weight.copy_(latent->experts()->up_weight);
    inner->experts()->down_weight.copy_(latent->experts()->down_weight);
  }
  const auto down = latent->named_parameters()["latent_down"];
  const auto up = latent->named_parameters()["latent_up"];
  const auto x = own(random_.normal({23, kHidden}));
  Router router(latent_options);
  const auto routed = router->forward(x);
  Routing routing;
  routing.expert_ids = routed.expert_ids;
  routing.weights = routed.weights.detach();

  const auto leaf = x.clone().requires_grad_();
  const auto y = latent->forward(leaf, routing).output;
  (y.square().sum()).backward();
  const auto plain_leaf = x.clone().requires_grad_();
  const auto down2 = down.detach().clone().requires_grad_();
  const auto up2 = up.detach().clone().requires_grad_();
  const auto plain =
      torch::linear(inner->forward(torch::linear(plain_leaf, down2), routing).output, up2);
  plain.square().sum().backward();
  const auto allowed = tolerance(torch::kFloat64, 400, 100);
  EXPECT_TRUE(close(y, plain, allowed));
  EXPECT_TRUE(close(leaf.grad(), plain_leaf.grad(), allowed));
  EXPECT_TRUE(close(down.grad(), down2.grad(), 23 * allowed));
  EXPECT_TRUE(close(up.grad(), up2.grad(), 23 * allowed));
}

/// The mean over sequences of E / k · Σ_e counts · probabilities / tokens², one after another.
double sequence_balance(const torch::Tensor& x, const torch::Tensor& padding,
                        const torch::Tensor& weight) {
  double sum = 0;
  int64_t sequences = 0;
  for (int64_t s = 0; s < x.size(0); ++s) {
    const auto kept = x[s].index({padding[s].logical_not()});
    if (kept.size(0) == 0) {
      continue;
    }
    const auto probabilities = torch::softmax(kept.matmul(weight.t()), 1);
    const auto ids = std::get<1>(probabilities.topk(kTopK, 1));
    const auto counts = ids.reshape({-1}).bincount({}, kExperts).to(torch::kFloat64);
    const auto tokens = static_cast<double>(kept.size(0));
    sum +=
        (counts * probabilities.sum(0)).sum().item<double>() * kExperts / kTopK / tokens / tokens;
    ++sequences;
  }
  return sequences > 0 ? sum / static_cast<double>(sequences) : 0;
}

TEST_F(LayerLossesTest, SequencesAreBalancedEachWithoutPadding) {
  for (const double share : {0.0, 0.4, 1.0}) {
    SCOPED_TRACE(share);
    auto with = options();
    with.sequence_balance_coefficient = 0.5;
    with.balance_coefficient = 0.25;
    MoELayer layer(with, world());
    const auto x = random_.normal({5, 9, kHidden});
    const auto padding = random_.uniform({5, 9}) < share;
    RoutingConditions conditions;
    conditions.padding_mask = own(padding).reshape({-1});
    const auto out = layer->forward(own(x), conditions);
    const auto weight = layer->named_parameters()["router.weight"].detach().cpu();
    const double expected = sequence_balance(x, padding, weight);
    EXPECT_NEAR(out.sequence_balance_loss.item<double>(), expected, 1e-12 * (1 + expected));
    // The batch's loss is that of one sequence of all tokens.
    const double balance =
        sequence_balance(x.view({1, 45, kHidden}), padding.view({1, 45}), weight);
    EXPECT_NEAR(out.balance_loss.item<double>(), balance, 1e-12 * (1 + balance));
    EXPECT_NEAR(out.auxiliary_loss.item<double>(), 0.5 * expected + 0.25 * balance, 1e-11);
    EXPECT_TRUE(out.output.index({own(padding)}).eq(0).all().item<bool>());
    EXPECT_EQ(out.expert_load.sum().item<int64_t>(),
              kTopK * padding.logical_not().sum().item<int64_t>());
  }
}

/// Of a step of several forwards, the share of each that has been: over ranks and forwards.
TEST_F(LayerLossesTest, AGlobalBalanceIsThatOfTheStepSoFar) {
  auto with = options();
  with.global_balance_coefficient = 0.5;
  with.z_coefficient = 0.1;
  MoELayer layer(with, world());
  const auto weight = layer->named_parameters()["router.weight"].detach().cpu();
  for (int step = 0; step < 2; ++step) {
    auto load = torch::zeros({kExperts}, torch::kFloat64);
    for (int i = 0; i < 3; ++i) {
      SCOPED_TRACE(c10::str("step ", step, " forward ", i));
      const auto x = random_.normal({4 + i, 9, kHidden});
      const auto all = x.view({-1, kHidden}).clone().requires_grad_();
      const auto probabilities = torch::softmax(all.matmul(weight.t()), 1);
      const auto ids = std::get<1>(probabilities.topk(kTopK, 1));
      load += ids.reshape({-1}).bincount({}, kExperts);
      const auto expected = kExperts * (load / load.sum() * probabilities.mean(0)).sum();
      expected.backward();

      const auto leaf = own(x).requires_grad_();
      const auto out = layer->forward(leaf);
      EXPECT_NEAR(out.global_balance_loss.item<double>(), expected.item<double>(), 1e-12);
      EXPECT_NEAR(out.auxiliary_loss.item<double>(),
                  0.5 * expected.item<double>() + 0.1 * out.z_loss.item<double>(), 1e-11);
      out.global_balance_loss.backward();
      const auto gradient = own(all.grad().view(x.sizes())) * world()->size();
      EXPECT_TRUE(close(leaf.grad(), gradient, tolerance(torch::kFloat64, 400, 10)));
    }
    layer->eval();
    layer->set_evaluation_losses(true);
    const auto x = random_.normal({4, 9, kHidden});
    const auto out = layer->forward(own(x));
    const double alone =
        sequence_balance(x.view({1, 36, kHidden}), torch::zeros({1, 36}, torch::kBool), weight);
    EXPECT_NEAR(out.global_balance_loss.item<double>(), alone, 1e-12);
    layer->train();
    layer->begin_step();
  }
}

/// Over all forwards and ranks, as one router that has seen all their tokens finds them.
TEST_F(LayerLossesTest, QuantilesAreThoseOfTheStep) {
  auto with = options();
  with.expert_bias = true;
  with.expert_bias_update = BiasUpdate::kQuantile;
  MoELayer layer(with, world());
  Router alone(with);
  for (int step = 0; step < 2; ++step) {
    std::vector<torch::Tensor> all;
    for (int i = 0; i < 3; ++i) {
      all.push_back(random_.normal({5, 7, kHidden}));
      layer->forward(own(all.back()));
    }
    layer->update_expert_bias(*world(), 0.75);
    const auto routing = alone->forward(on_device(torch::cat(all).view({-1, kHidden})));
    alone->update_expert_bias(routing.bias_histogram, 0.75);
    EXPECT_TRUE(identical(layer->named_buffers()["router.expert_bias"], alone->expert_bias));
    EXPECT_GT(alone->expert_bias.abs().max().item<double>(), 0);
  }
}

TEST_F(LayerLossesTest, AnAttachedLossIsTheOneHandedOn) {
  auto with = options();
  with.sequence_balance_coefficient = 0.5;
  with.z_coefficient = 0.1;
  MoELayer plain(with, world());
  with.attach_losses = true;
  MoELayer attached(with, world());
  const auto x = own(random_.normal({5, 9, kHidden}));
  const auto scale = torch::full({}, 8.0, x.options());
  const auto out = plain->forward(x);
  (out.output.square().sum() + 8.0 * out.auxiliary_loss).backward();
  attached->set_attached_loss_scale(scale);
  attached->forward(x).output.square().sum().backward();
  for (const auto& parameter : plain->named_parameters()) {
    const auto other = attached->named_parameters()[parameter.key()];
    EXPECT_TRUE(identical(other.grad(), parameter.value().grad())) << parameter.key();
  }
  attached->eval();
  plain->eval();
  attached->zero_grad();
  plain->zero_grad();
  attached->forward(x).output.sum().backward();
  plain->forward(x).output.sum().backward();
  EXPECT_TRUE(identical(attached->named_parameters()["router.weight"].grad(),
                        plain->named_parameters()["router.weight"].grad()));
}

TEST_F(LayerLossesTest, AnEvaluationSumsNothing) {
  MoELayer layer(options(), world());
  const auto x = own(random_.normal({23, kHidden}));
  const auto& communicator = layer->exchange().communicator();
  const torch::NoGradGuard no_grad;
  const auto collectives = [&](MoEOutput& out) {
    const int64_t before = communicator.traffic().collectives;
    out = layer->forward(x);
    return communicator.traffic().collectives - before;
  };
  MoEOutput trained, evaluated, asked;
  collectives(trained);  // engines are agreed on in the first step
  const int64_t in_training = collectives(trained);
  layer->eval();
  EXPECT_EQ(collectives(evaluated), in_training - (communicator.size() > 1 ? 1 : 0));
  layer->set_evaluation_losses(true);
  EXPECT_EQ(collectives(asked), in_training);
  EXPECT_TRUE(identical(evaluated.output, trained.output));
  EXPECT_TRUE(identical(evaluated.expert_load, evaluated.own_expert_load));
  EXPECT_FALSE(evaluated.balance_loss.defined() || evaluated.z_loss.defined());
  EXPECT_TRUE(identical(asked.expert_load, trained.expert_load));
  EXPECT_TRUE(identical(asked.balance_loss, trained.balance_loss));
}

TEST_F(LayerLossesTest, RanksThatDifferInEvaluationAreToldSo) {
  if (world()->size() == 1) GTEST_SKIP() << "of several ranks";
  MoELayer layer(options(), world());
  const auto x = own(random_.normal({23, kHidden}));
  const torch::NoGradGuard no_grad;
  const auto expected = layer->forward(x).output;
  layer->train(world()->rank() == world()->size() - 1);
  EXPECT_THROW(layer->forward(x), CommunicationError);
  layer->train();
  EXPECT_TRUE(identical(layer->forward(x).output, expected));
}

}  // namespace
}  // namespace anabranch::test
