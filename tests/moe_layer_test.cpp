#include <anabranch/gradients.h>
#include <anabranch/moe_layer.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "support/collectives.h"
#include "support/devices.h"
#include "support/layer_case.h"
#include "support/placements.h"
#include "support/step_limits.h"
#include "support/thrown.h"
#include "support/tolerance.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

void expect_equals_reference(const LayerCase& layer_case, const Step& step,
                             const NamedTensors& gradients, const Expected& expected,
                             const std::vector<int64_t>& counts, int rank, int ranks) {
  const StepLimits limits(layer_case, expected.scale, ranks);
  const auto& result = expected.result;
  EXPECT_EQ(step.output.output.scalar_type(), layer_case.options.dtype);
  EXPECT_TRUE(
      close(step.output.output, shard(result.output, counts, rank), limits.output(result.output)))
      << "output";
  EXPECT_TRUE(step.output.expert_load.cpu().equal(result.load.cpu())) << step.output.expert_load;
  EXPECT_EQ(step.output.balance_loss.defined(), !layer_case.routing_from_outside);
  EXPECT_EQ(step.output.z_loss.defined(), !layer_case.routing_from_outside);
  if (!layer_case.routing_from_outside) {
    EXPECT_TRUE(
        close(step.output.balance_loss, result.balance_loss, limits.loss(result.balance_loss)))
        << "balance loss";
    EXPECT_TRUE(close(step.output.z_loss, result.z_loss, limits.loss(result.z_loss))) << "z loss";
  }
  EXPECT_TRUE(close(step.x.grad(), shard(expected.dx, counts, rank), limits.dx(expected.dx)))
      << "dx";
  if (layer_case.routing_from_outside) {
    EXPECT_TRUE(close(step.weights.grad(), shard(expected.dweights, counts, rank),
                      limits.dweights(expected.dweights)))
        << "gradient of the routing weights";
  }
  EXPECT_EQ(gradients.size(), expected.gradients.size());
  for (const auto& [name, gradient] : gradients) {
    const auto& exact = expected.gradients.at(name);
    EXPECT_TRUE(close(gradient, exact, limits.gradient(name, exact))) << "gradient of " << name;
  }
}

class MoELayerTest : public ::testing::Test {
 protected:
  MoEOptions small_options() {
    MoEOptions options;
    options.hidden_size = 16;
    options.expert_hidden_size = 20;
    options.num_experts = 6;
    options.top_k = 2;
    options.bias = options.glu = true;
    options.shared_expert_hidden_size = 8;
    options.device = device();
    options.activation = Activation::kSilu;
    return options;
  }
  LayerCase small_case(const MoEOptions& options, bool routing_from_outside = false) {
    return draw_layer_case(random_, world_->size(), options, 24, Skew::kZipf, Split::kUneven,
                           routing_from_outside);
  }
  std::shared_ptr<Communicator> world_ = world();
  int rank_ = world_->rank();
  Random random_{test_seed()};
};

TEST_F(MoELayerTest, EqualsTheDenseReference) {
  for (const auto& layer_case : layer_cases(random_, world_->size(), effort(50))) {
    SCOPED_TRACE(layer_case.describe());
    const auto expected = run_reference(layer_case, world_->size());
    auto layer = make_layer(layer_case, world_);
    const auto step = run_step(layer, layer_case, layer_case.counts, rank_);
    const auto gradients = gather_gradients(layer, *world_);
    expect_equals_reference(layer_case, step, gradients, expected, layer_case.counts, rank_,
                            world_->size());
  }
}

// The layer as it is constructed, at W ranks and on one that holds the whole batch.
TEST_F(MoELayerTest, EqualsOneRankThatHoldsEverything) {
  for (int64_t i = 0; i < effort(12); ++i) {
    auto options = small_options();
    options.num_experts = random_.pick<int64_t>({1, 2, 3, 5, 8, 16});
    options.top_k = random_.integer(1, options.num_experts);
    options.renormalize = options.top_k > 1;
    options.seed = random_.next();
    options.dtype = random_.pick<torch::Dtype>({torch::kFloat32, torch::kFloat64});
    auto layer_case = draw_layer_case(random_, world_->size(), options, random_.integer(0, 50),
                                      Skew::kUniform, random_.pick(all_splits()), false);
    SCOPED_TRACE(layer_case.describe());
    MoELayer alone(options, make_self_communicator());
    for (const auto& parameter : alone->named_parameters()) {
      layer_case.parameters[parameter.key()] = parameter.value().detach().cpu().clone();
    }
    // Not drawn with these parameters: away from switches in all likelihood, but check.
    const auto dense = make_reference(layer_case.parameters, options, layer_case.expert_bias);
    if (dense.margin(layer_case.x.to(torch::kFloat64), true) < 1e-6) {
      continue;
    }
    MoELayer spread(options, world_);
    const auto step = run_step(spread, layer_case, layer_case.counts, rank_);
    layer_case.balance_coefficient *= world_->size();
    layer_case.z_coefficient *= world_->size();
    const auto whole = run_step(alone, layer_case, {layer_case.tokens}, 0);

    Expected expected;
    expected.result.output = whole.output.output.detach();
    expected.result.balance_loss = whole.output.balance_loss.detach();
    expected.result.z_loss = whole.output.z_loss.detach();
    expected.result.load = whole.output.expert_load;
    expected.dx = whole.x.grad();
    expected.scale = run_reference(layer_case, 1).scale;
    expected.gradients = gather_gradients(alone, *make_self_communicator());
    expect_equals_reference(layer_case, step, gather_gradients(spread, *world_), expected,
                            layer_case.counts, rank_, world_->size());
  }
}

// Contract 3: after finish_gradients every rank has the gradient of the mean of the ranks' losses.
TEST_F(MoELayerTest, FinishedGradientsAreThoseOfTheMeanLoss) {
  auto options = small_options();
  options.dtype = torch::kFloat64;
  const auto layer_case = small_case(options);
  const auto expected = run_reference(layer_case, world_->size());
  auto layer = make_layer(layer_case, world_);
  run_step(layer, layer_case, layer_case.counts, rank_);
  finish_gradients(*layer, parallel_groups());
  const StepLimits limits(layer_case, expected.scale, world_->size());
  for (const auto& parameter : layer->named_parameters()) {
    auto exact = expected.gradients.at(parameter.key()) / world_->size();
    if (parameter.key().rfind("experts.", 0) == 0) {
      exact = part_of(exact, parameter.key(), layer->exchange().placement(), rank_,
                      options.expert_hidden_size, options.glu);
    }
    EXPECT_TRUE(close(parameter.value().grad(), exact,
                      limits.gradient(parameter.key(), expected.gradients.at(parameter.key()))))
        << parameter.key();
  }
}

TEST_F(MoELayerTest, TwoRunsAgreeBitForBit) {
  for (const auto& layer_case : layer_cases(random_, world_->size(), effort(12))) {
    SCOPED_TRACE(layer_case.describe());
    const auto once = [&] {
      auto layer = make_layer(layer_case, world_);
      const auto step = run_step(layer, layer_case, layer_case.counts, rank_);
      std::vector<torch::Tensor> results = {
          step.output.output, step.output.balance_loss, step.output.z_loss, step.x.grad(),
          step.weights.defined() ? step.weights.grad() : torch::Tensor()};
      for (const auto& parameter : layer->parameters()) {
        results.push_back(parameter.grad());
      }
      return results;
    };
    const auto first = once();
    const auto second = once();
    for (size_t i = 0; i < first.size(); ++i) {
      EXPECT_TRUE(identical(first[i], second[i])) << "result " << i;
    }
  }
}

// An expert id of −1 is no assignment: as one of weight 0, but nothing is computed for it.
TEST_F(MoELayerTest, SkippedAssignmentsCostNothingAndChangeNothing) {
  for (const bool all_of_a_token : {false, true}) {
    auto options = small_options();
    options.dtype = torch::kFloat64;
    auto layer_case = small_case(options, /*routing_from_outside=*/true);
    auto skipped = random_.uniform(layer_case.expert_ids.sizes()) < 0.4;
    if (all_of_a_token) {
      skipped[3].fill_(true);
    }
    layer_case.weights = layer_case.weights.masked_fill(skipped, 0);
    const auto expected = run_reference(layer_case, world_->size());
    auto layer = make_layer(layer_case, world_);
    const auto mine = [&](const torch::Tensor& whole) {
      return shard(whole, layer_case.counts, rank_);
    };
    const auto x = mine(layer_case.x).requires_grad_();
    Routing routing;
    routing.may_skip = true;
    routing.expert_ids = mine(layer_case.expert_ids.masked_fill(skipped, -1));
    routing.weights = mine(layer_case.weights.masked_fill(skipped, std::nan(""))).requires_grad_();
    const auto output = layer->forward(x, routing);
    (output.output * mine(layer_case.doutput)).sum().backward();

    const StepLimits limits(layer_case, expected.scale, world_->size());
    EXPECT_TRUE(
        close(output.output, mine(expected.result.output), limits.output(expected.result.output)));
    EXPECT_TRUE(close(x.grad(), mine(expected.dx), limits.dx(expected.dx)));
    EXPECT_TRUE(close(routing.weights.grad(), mine(expected.dweights.masked_fill(skipped, 0)),
                      limits.dweights(expected.dweights)));
    const auto gradients = gather_gradients(layer, *world_);
    for (const auto& [name, gradient] : gradients) {
      const auto& exact = expected.gradients.at(name);
      EXPECT_TRUE(close(gradient, exact, limits.gradient(name, exact))) << name;
    }
    const auto kept = layer_case.expert_ids.index({skipped.logical_not()});
    EXPECT_TRUE(output.expert_load.cpu().equal(kept.bincount({}, options.num_experts)));
  }
}

// Each rank draws for its own tokens; the layer sends what the router chose.
TEST_F(MoELayerTest, GShardSendsSecondChoicesByChance) {
  auto options = small_options();
  options.gate = Gate::kGShard;
  options.dtype = torch::kFloat64;
  const auto layer_case = small_case(options);
  auto layer = make_layer(layer_case, world_);
  Router router(options);
  {
    const torch::NoGradGuard no_grad;
    router->weight.copy_(layer_case.parameters.at("router.weight"));
  }
  const auto x = shard(layer_case.x, layer_case.counts, rank_);
  torch::manual_seed(test_seed() + static_cast<uint64_t>(rank_));
  const auto output = layer->forward(x);
  torch::manual_seed(test_seed() + static_cast<uint64_t>(rank_));
  const auto routing = router->forward(x);
  // Where the second is not taken its weight is 0: any other than the first stands for it.
  const auto first = routing.expert_ids.select(1, 0).cpu();
  const auto second = routing.expert_ids.select(1, 1).cpu();
  const auto ids = torch::stack(
      {first, torch::where(second < 0, (first + 1).remainder(options.num_experts), second)}, 1);
  const auto expected = make_reference(layer_case.parameters, options)
                            .forward(x.cpu(), ids, routing.weights.detach().cpu());
  const StepLimits limits(layer_case, run_reference(layer_case, world_->size()).scale,
                          world_->size());
  EXPECT_TRUE(close(output.output, expected.output, limits.output(expected.output)));
  const auto everywhere = [&](const torch::Tensor& sum) {
    return sum_over_ranks(*world_, sum.cpu().to(torch::kFloat64));
  };
  EXPECT_TRUE(output.expert_load.cpu().to(torch::kFloat64).equal(everywhere(routing.counts)));
  const auto share = everywhere(routing.first_counts) / static_cast<double>(layer_case.tokens);
  const auto mean =
      everywhere(routing.probability_sum.detach()) / static_cast<double>(layer_case.tokens);
  EXPECT_NEAR(output.balance_loss.item<double>(),
              static_cast<double>(options.num_experts) * (share * mean).sum().item<double>(),
              limits.loss(output.balance_loss));
  EXPECT_FALSE(output.load_loss.defined());
}

TEST_F(MoELayerTest, NoisyGateHasImportanceAndLoadLosses) {
  auto options = small_options();
  options.gate = Gate::kNoisyTopK;
  options.dtype = torch::kFloat64;
  auto layer_case = draw_layer_case(random_, world_->size(), small_options(), 24, Skew::kZipf,
                                    Split::kUneven, false);
  MoELayer layer(options, world_);
  Router router(options);
  const auto x = shard(layer_case.x.to(torch::kFloat64), layer_case.counts, rank_);
  torch::manual_seed(test_seed() + static_cast<uint64_t>(rank_));
  const auto output = layer->forward(x);
  (output.importance_loss + output.load_loss).backward();
  torch::manual_seed(test_seed() + static_cast<uint64_t>(rank_));
  const auto routing = router->forward(x);
  const auto variation = [&](const torch::Tensor& sums) {
    return reference::squared_variation(sum_over_ranks(*world_, sums.detach().cpu()))
        .item<double>();
  };
  const double allowed = tolerance(torch::kFloat64, 1000, 10);
  EXPECT_NEAR(output.importance_loss.item<double>(), variation(routing.importance), allowed);
  EXPECT_NEAR(output.load_loss.item<double>(), variation(routing.smooth_load), allowed);
  const auto gradients = gather_gradients(layer, *world_);
  EXPECT_GT(max_abs(gradients.at("router.weight")), 0);
  EXPECT_GT(max_abs(gradients.at("router.noise_weight")), 0);
}

// Recomputing gives the very same numbers, not only close ones.
TEST_F(MoELayerTest, RecomputeChangesNothing) {
  for (const auto dtype : {torch::kFloat32, torch::kBFloat16}) {
    auto options = small_options();
    options.dtype = dtype;
    auto layer_case = small_case(options);
    auto kept = make_layer(layer_case, world_);
    const auto kept_step = run_step(kept, layer_case, layer_case.counts, rank_);
    layer_case.options.recompute = true;
    auto recomputed = make_layer(layer_case, world_);
    const auto step = run_step(recomputed, layer_case, layer_case.counts, rank_);
    EXPECT_TRUE(identical(step.output.output, kept_step.output.output));
    EXPECT_TRUE(identical(step.x.grad(), kept_step.x.grad()));
    const auto parameters = recomputed->named_parameters();
    for (const auto& parameter : kept->named_parameters()) {
      EXPECT_TRUE(identical(parameters[parameter.key()].grad(), parameter.value().grad()))
          << parameter.key();
    }
  }
}

// The tests' allocations are poisoned (mpi_main.cpp): without this, no other test here proves that
// every element is written.
TEST_F(MoELayerTest, UninitialisedMemoryIsPoisoned) {
  EXPECT_TRUE(torch::empty({64}, device()).isnan().all().item<bool>());
  EXPECT_TRUE(torch::empty({3}, torch::TensorOptions(torch::kInt64).device(device()))
                  .eq(std::numeric_limits<int64_t>::max())
                  .all()
                  .item<bool>());
}

TEST_F(MoELayerTest, InputMayHaveAnyLeadingShapeAndStrides) {
  auto options = small_options();
  options.dtype = torch::kFloat64;
  auto layer_case = draw_layer_case(random_, 1, options, 24, Skew::kUniform, Split::kEven, false);
  auto layer = make_layer(layer_case, world_);
  const auto tokens = on_device(layer_case.x);
  const auto flat = layer->forward(tokens).output.detach();
  // The same tokens in another order or number: a product of matrices may round otherwise.
  const auto scale = run_reference(layer_case, 1).scale;
  const StepLimits limits(layer_case, scale, world_->size());
  const auto expect_same = [&](const torch::Tensor& x, const torch::Tensor& expected) {
    auto leaf = x.detach().requires_grad_();
    const auto output = layer->forward(leaf).output;
    EXPECT_EQ(output.sizes(), x.sizes());
    EXPECT_TRUE(close(output, expected, limits.output(flat)));
    output.sum().backward();
    EXPECT_EQ(leaf.grad().sizes(), x.sizes());
    EXPECT_TRUE(leaf.grad().isfinite().all().item<bool>());
  };
  expect_same(tokens.reshape({2, 12, 16}), flat.reshape({2, 12, 16}));
  expect_same(tokens.reshape({2, 3, 4, 16}), flat.reshape({2, 3, 4, 16}));
  expect_same(tokens[5], flat[5]);  // a single token, [h]
  const auto transposed = tokens.reshape({4, 6, 16}).transpose(0, 1);
  ASSERT_FALSE(transposed.is_contiguous());
  expect_same(transposed, flat.reshape({4, 6, 16}).transpose(0, 1).contiguous());
  const auto columns = tokens.t().contiguous().t();
  expect_same(columns, flat);
  const auto expanded = tokens[0].expand({7, 16});
  expect_same(expanded, flat[0].expand({7, 16}).contiguous());
  expect_same(tokens.slice(0, 0, 0).reshape({0, 3, 16}), flat.slice(0, 0, 0).reshape({0, 3, 16}));
}

// Gradients of an expanded output (sum().backward()) are expanded themselves, of strides 0.
TEST_F(MoELayerTest, AcceptsAnExpandedGradient) {
  auto layer_case = small_case(small_options());
  auto ones = layer_case;
  ones.doutput = torch::ones_like(layer_case.doutput);
  ones.balance_coefficient = ones.z_coefficient = 0;
  auto expected_layer = make_layer(ones, world_);
  const auto expected = run_step(expected_layer, ones, ones.counts, rank_);
  auto layer = make_layer(layer_case, world_);
  const auto x = shard(layer_case.x, layer_case.counts, rank_).requires_grad_();
  layer->forward(x).output.sum().backward();
  EXPECT_TRUE(identical(x.grad(), expected.x.grad()));
}

TEST_F(MoELayerTest, InputNeedsNoGradient) {
  auto options = small_options();
  options.dtype = torch::kFloat64;
  const auto layer_case = small_case(options);
  const auto expected = run_reference(layer_case, world_->size());
  auto layer = make_layer(layer_case, world_);
  const auto x = shard(layer_case.x, layer_case.counts, rank_);
  const auto output = layer->forward(x);
  loss_of(layer_case, output, shard(layer_case.doutput, layer_case.counts, rank_)).backward();
  EXPECT_FALSE(x.grad().defined());
  const StepLimits limits(layer_case, expected.scale, world_->size());
  for (const auto& [name, gradient] : gather_gradients(layer, *world_)) {
    const auto& exact = expected.gradients.at(name);
    EXPECT_TRUE(close(gradient, exact, limits.gradient(name, exact))) << name;
  }
}

// Each rank may want other gradients than its neighbours: all still take part in the exchange.
TEST_F(MoELayerTest, FrozenParametersAndInputsMayDifferBetweenRanks) {
  auto options = small_options();
  options.dtype = torch::kFloat64;
  auto layer_case = small_case(options);
  const auto expected = run_reference(layer_case, world_->size());
  const StepLimits limits(layer_case, expected.scale, world_->size());
  for (const std::string frozen : {"router", "experts.up_weight", "experts.down", "shared_expert",
                                   ""}) {  // "": all parameters
    SCOPED_TRACE("frozen: " + frozen);
    auto layer = make_layer(layer_case, world_);
    for (auto& parameter : layer->named_parameters()) {
      parameter.value().set_requires_grad(parameter.key().rfind(frozen, 0) != 0);
    }
    const auto step = run_step(layer, layer_case, layer_case.counts, rank_);
    EXPECT_TRUE(
        close(step.x.grad(), shard(expected.dx, layer_case.counts, rank_), limits.dx(expected.dx)));
    const auto gradients = gather_gradients(layer, *world_);
    for (const auto& parameter : layer->named_parameters()) {
      const auto& exact = expected.gradients.at(parameter.key());
      if (parameter.key().rfind(frozen, 0) == 0) {
        EXPECT_FALSE(parameter.value().grad().defined()) << parameter.key();
      } else {
        EXPECT_TRUE(
            close(gradients.at(parameter.key()), exact, limits.gradient(parameter.key(), exact)))
            << parameter.key();
      }
    }
  }
  // Only rank 0's input wants a gradient, and its parameters do not.
  for (const char* balance : {"off", "replicas", "gather"}) {
    SCOPED_TRACE(balance);
    layer_case.options.balance = balance;
    auto layer = make_layer(layer_case, world_);
    for (auto& parameter : layer->parameters()) {
      parameter.set_requires_grad(rank_ != 0);
    }
    auto x = shard(layer_case.x, layer_case.counts, rank_).requires_grad_(rank_ == 0);
    const auto output = layer->forward(x);
    loss_of(layer_case, output, shard(layer_case.doutput, layer_case.counts, rank_)).backward();
    EXPECT_EQ(x.grad().defined(), rank_ == 0);
    if (rank_ == 0) {
      EXPECT_TRUE(
          close(x.grad(), shard(expected.dx, layer_case.counts, 0), limits.dx(expected.dx)));
    }
    // Whoever computed its tokens: an expert that is trained has its gradient.
    const int64_t frozen = layer->exchange().placement().local_experts(0);
    for (const auto& [name, gradient] : gather_gradients(layer, *world_)) {
      if (name.rfind("experts.", 0) != 0 || frozen == options.num_experts) continue;
      const auto trained = [&](const torch::Tensor& whole) {
        return whole.narrow(0, frozen, options.num_experts - frozen);
      };
      const auto& exact = expected.gradients.at(name);
      EXPECT_EQ(max_abs(gradient.narrow(0, 0, frozen)), 0) << name;
      EXPECT_TRUE(close(trained(gradient), trained(exact), limits.gradient(name, exact))) << name;
    }
  }
}

// Sums of full width in the place of grad(): of every backward, not rounded to the weights' type.
TEST_F(MoELayerTest, MainGradientsTakeTheWeightsGradients) {
  for (const auto dtype : all_dtypes()) {
    SCOPED_TRACE(to_string(dtype));
    auto options = small_options();
    options.dtype = dtype;
    const auto layer_case = small_case(options);
    auto plain = make_layer(layer_case, world_);
    run_step(plain, layer_case, layer_case.counts, rank_);
    auto layer = make_layer(layer_case, world_);
    auto experts = layer->experts();
    const auto sum_of = [&](const torch::Tensor& weight) {
      return torch::ones_like(weight, weight.options().dtype(accumulation_type(dtype)));
    };
    experts->main_grad = {sum_of(experts->up_weight), sum_of(experts->down_weight)};
    constexpr int kSteps = 2;
    for (int step = 0; step < kSteps; ++step) {
      run_step(layer, layer_case, layer_case.counts, rank_);
    }
    const auto expect_sum = [&](const torch::Tensor& sum, const torch::Tensor& gradient) {
      const auto exact = 1 + kSteps * gradient.to(torch::kFloat64);
      // Rows are added in another order than those of a gradient by itself.
      const auto most = max_abs(exact) + 1;
      EXPECT_TRUE(close(sum, exact, tolerance(dtype, kSteps * layer_case.tokens, most)));
    };
    expect_sum(experts->main_grad.up, plain->experts()->up_weight.grad());
    expect_sum(experts->main_grad.down, plain->experts()->down_weight.grad());
    EXPECT_FALSE(experts->up_weight.grad().defined());
    EXPECT_FALSE(experts->down_weight.grad().defined());
    EXPECT_TRUE(identical(experts->up_bias.grad(), plain->experts()->up_bias.grad() * kSteps));

    const auto groups = parallel_groups();
    const auto before = experts->main_grad.up.clone();
    finish_gradients(*layer, groups);
    EXPECT_TRUE(identical(experts->main_grad.up, before / world_->size()));
    EXPECT_FALSE(experts->up_weight.grad().defined());
  }
}

TEST_F(MoELayerTest, TheSharedExpertHasMainGradientsToo) {
  auto options = small_options();
  options.shared_expert_hidden_size = 5;
  const auto layer_case = small_case(options);
  const auto groups = parallel_groups();
  auto plain = make_layer(layer_case, world_);
  run_step(plain, layer_case, layer_case.counts, rank_);
  finish_gradients(*plain, groups);
  const double norm = gradient_norm(*plain, groups);

  auto layer = make_layer(layer_case, world_);
  auto shared = layer->shared_expert();
  shared->main_grad = {torch::zeros_like(shared->up_weight),
                       torch::zeros_like(shared->down_weight)};
  run_step(layer, layer_case, layer_case.counts, rank_);
  finish_gradients(*layer, groups);
  EXPECT_FALSE(shared->up_weight.grad().defined());
  const auto expect_same = [&](const torch::Tensor& sum, const torch::Tensor& gradient) {
    const auto most = max_abs(gradient);
    EXPECT_GT(most, 0);
    EXPECT_TRUE(close(sum, gradient, tolerance(options.dtype, layer_case.tokens, most)));
  };
  expect_same(shared->main_grad.up, plain->shared_expert()->up_weight.grad());
  expect_same(shared->main_grad.down, plain->shared_expert()->down_weight.grad());
  EXPECT_NEAR(clip_gradient_norm(*layer, norm / 2, groups), norm,
              tolerance(options.dtype, layer_case.tokens, norm));
  expect_same(shared->main_grad.up * 2, plain->shared_expert()->up_weight.grad());
}

TEST_F(MoELayerTest, MainGradientsAreFinishedOnceAStep) {
  ANABRANCH_NEEDS_RANKS(2);
  const auto layer_case = small_case(small_options());
  const auto groups = parallel_groups();
  auto layer = make_layer(layer_case, world_);
  auto experts = layer->experts();
  experts->main_grad = {torch::zeros_like(experts->up_weight),
                        torch::zeros_like(experts->down_weight)};
  torch::Tensor first;
  for (int step = 0; step < 2; ++step) {
    layer->zero_grad();
    experts->main_grad.up.zero_();
    experts->main_grad.down.zero_();
    run_step(layer, layer_case, layer_case.counts, rank_);
    finish_gradients(*layer, groups);
    if (step == 0) first = experts->main_grad.up.clone();
    EXPECT_TRUE(identical(experts->main_grad.up, first));
    EXPECT_INPUT_ERROR(finish_gradients(*layer, groups), "is finished already");
  }
}

TEST_F(MoELayerTest, FrozenWeightsLeaveMainGradientsAlone) {
  const auto layer_case = small_case(small_options());
  auto layer = make_layer(layer_case, world_);
  auto experts = layer->experts();
  experts->main_grad = {torch::ones_like(experts->up_weight),
                        torch::ones_like(experts->down_weight)};
  experts->up_weight.set_requires_grad(false);
  run_step(layer, layer_case, layer_case.counts, rank_);
  EXPECT_TRUE(identical(experts->main_grad.up, torch::ones_like(experts->up_weight)));
  // A rank's experts may have had no token, but not all ranks'.
  const bool changed = !experts->main_grad.down.equal(torch::ones_like(experts->down_weight));
  EXPECT_GT(sum_over_ranks(*world_, changed ? 1.0 : 0.0), 0);
}

TEST_F(MoELayerTest, WithoutGradientsForwardIsTheSame) {
  const auto layer_case = small_case(small_options());
  auto layer = make_layer(layer_case, world_);
  const auto x = shard(layer_case.x, layer_case.counts, rank_);
  const auto with = layer->forward(x).output.detach();
  const torch::NoGradGuard no_grad;
  const auto without = layer->forward(x).output;
  EXPECT_TRUE(identical(without, with));
  EXPECT_FALSE(without.requires_grad());
}

// Two steps in flight: the plan and what is saved belong to the step, not to the layer.
TEST_F(MoELayerTest, ForwardTwiceThenBackwardInEitherOrder) {
  auto options = small_options();
  options.dtype = torch::kFloat64;
  const auto first = small_case(options);
  auto second = draw_layer_case(random_, world_->size(), options, 30, Skew::kUniform,
                                Split::kSomeEmpty, false);
  second.parameters = first.parameters;
  auto layer = make_layer(first, world_);
  const auto x1 = shard(first.x, first.counts, rank_).requires_grad_();
  const auto x2 = shard(second.x, second.counts, rank_).requires_grad_();
  const auto y1 = layer->forward(x1);
  const auto y2 = layer->forward(x2);
  loss_of(first, y1, shard(first.doutput, first.counts, rank_)).backward();
  loss_of(second, y2, shard(second.doutput, second.counts, rank_)).backward();
  auto alone = make_layer(first, world_);
  EXPECT_TRUE(identical(x1.grad(), run_step(alone, first, first.counts, rank_).x.grad()));
  EXPECT_TRUE(identical(x2.grad(), run_step(alone, second, second.counts, rank_).x.grad()));
  // Gradients accumulate over the two steps.
  const auto parameters = alone->named_parameters();
  for (const auto& parameter : layer->named_parameters()) {
    EXPECT_TRUE(identical(parameter.value().grad(), parameters[parameter.key()].grad()))
        << parameter.key();
  }
}

// Backward may use up what forward has kept, but not where it is to be read again.
TEST_F(MoELayerTest, BackwardTwiceOfAGraphThatIsRetained) {
  for (const bool glu : {false, true}) {
    auto options = small_options();
    options.glu = glu;
    const auto layer_case = small_case(options);
    auto layer = make_layer(layer_case, world_);
    const auto x = shard(layer_case.x, layer_case.counts, rank_).requires_grad_();
    const auto doutput = shard(layer_case.doutput, layer_case.counts, rank_);
    const auto loss = loss_of(layer_case, layer->forward(x), doutput);
    const auto gradients = [&](bool retain_graph) {
      layer->zero_grad();
      x.mutable_grad().reset();
      loss.backward({}, retain_graph);
      std::vector<torch::Tensor> result = {x.grad()};
      for (const auto& parameter : layer->parameters()) {
        result.push_back(parameter.grad());
      }
      return result;
    };
    const auto first = gradients(true);
    const auto second = gradients(false);
    for (size_t i = 0; i < first.size(); ++i) {
      EXPECT_TRUE(identical(first[i], second[i])) << "result " << i;
    }
  }
}

TEST_F(MoELayerTest, NoTokensAnywhere) {
  for (const auto dtype : {torch::kFloat32, torch::kFloat64, torch::kBFloat16, torch::kFloat16}) {
    auto options = small_options();
    options.dtype = dtype;
    MoELayer layer(options, world_);
    auto x = on_device(torch::empty({0, 16}, dtype)).requires_grad_();
    const auto output = layer->forward(x);
    EXPECT_EQ(output.output.sizes(), torch::IntArrayRef({0, 16}));
    EXPECT_EQ(output.balance_loss.item<double>(), 0);
    EXPECT_EQ(output.z_loss.item<double>(), 0);
    EXPECT_EQ(output.expert_load.sum().item<int64_t>(), 0);
    (output.output.sum() + output.balance_loss + output.z_loss).backward();
    EXPECT_EQ(x.grad().sizes(), torch::IntArrayRef({0, 16}));
    for (const auto& parameter : layer->named_parameters()) {
      EXPECT_TRUE(!parameter.value().grad().defined() || max_abs(parameter.value().grad()) == 0)
          << parameter.key();
    }
  }
}

TEST_F(MoELayerTest, WithoutACommunicatorItRunsAlone) {
  const auto options = small_options();
  MoELayer layer(options);
  MoELayer with_self(options, make_self_communicator());
  const auto x = on_device(random_.normal({5, 16}, torch::kFloat32));
  EXPECT_TRUE(identical(layer->forward(x).output, with_self->forward(x).output));
  EXPECT_EQ(layer->exchange().communicator().size(), 1);
}

TEST_F(MoELayerTest, LossesAndLoadAreEqualOnEveryRank) {
  const auto layer_case = small_case(small_options());
  auto layer = make_layer(layer_case, world_);
  const auto output = layer->forward(shard(layer_case.x, layer_case.counts, rank_));
  for (auto value : {output.balance_loss, output.z_loss, output.expert_load}) {
    const auto everybody = world_->all_gather(value.detach().contiguous());
    for (int r = 0; r < world_->size(); ++r) {
      EXPECT_TRUE(identical(everybody[r], everybody[0]));
    }
  }
  EXPECT_EQ(output.expert_load.sum().item<int64_t>(), 24 * 2);
}

TEST(ImbalanceTest, IsTheFullestExpertOverTheMean) {
  EXPECT_DOUBLE_EQ(imbalance(torch::tensor({4, 4, 4}, torch::kInt64)), 1);
  EXPECT_DOUBLE_EQ(imbalance(torch::tensor({12, 0, 0}, torch::kInt64)), 3);
  EXPECT_TRUE(std::isfinite(imbalance(torch::zeros({3}, torch::kInt64))));
}

}  // namespace
}  // namespace anabranch::test
