// Gradients of layers wherever their experts lie and whatever travels: finished, by themselves and beside backward,
// clipped, and not finite on one rank. That the steps before compute what the dense reference does is among the cases
// of moe_layer_test.
#include <anabranch/gradient_reducer.h>
#include <anabranch/gradients.h>
#include <anabranch/moe_layer.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "support/devices.h"
#include "support/layer_case.h"
#include "support/placements.h"
#include "support/step_limits.h"
#include "support/tolerance.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

/// A layer of small experts, of which as many rows weigh more than one that goes to all ranks.
MoEOptions small_options(int64_t num_experts) {
  MoEOptions options;
  options.hidden_size = 4;
  options.expert_hidden_size = 24;
  options.shared_expert_hidden_size = 3;
  options.num_experts = num_experts;
  options.top_k = std::min<int64_t>(2, num_experts);
  options.renormalize = num_experts > 1;
  options.glu = options.bias = true;
  options.activation = Activation::kSilu;
  options.engine = "deterministic";
  options.device = device();
  return options;
}

/// Every kind of placement over so many ranks, and of what travels.
std::vector<MoEOptions> kinds(Random& random, int64_t ranks) {
  std::vector<MoEOptions> found;
  const auto add = [&](int64_t num_experts, const std::string& placement, const char* balance) {
    auto& options = found.emplace_back(small_options(num_experts));
    options.placement = placement;
    options.balance = balance;
    if (options.balance != "off") options.expert_hidden_size = 4;
    return &options;
  };
  add(5, "blocks", "off");
  for (int i = 0; i < 2; ++i) {
    const auto lists = random_placement(random, 5, ranks, 24).describe();
    add(5, lists, "off")->receive_rows_limit = i * (ranks + 1);
  }
  add(5, "movable", "off");
  // A rank has all of an expert, or a slice: 1/ranks, about a half, and one expert in two halves.
  add(1, "sliced", "off");
  add(std::max<int64_t>(ranks / 2, 1), "sliced", "off");
  add(std::max<int64_t>(ranks - 1, 1), "sliced", "off")->receive_rows_limit = ranks;
  add(3, "movable", "shadow");
  add(3, "blocks", "replicas");  // of more than three ranks some have but what they borrow
  add(3, "blocks", ranks % 2 == 0 ? "gather:2" : "gather")->recompute = true;
  add(1, "blocks", "replicas")->receive_rows_limit = ranks + 2;
  return found;
}

/// The mean over the ranks' losses, in which those of the gate have no part: they are each expert-parallel group's own.
LayerCase draw_case(Random& random, const MoEOptions& options, int64_t tokens, Skew skew) {
  auto layer_case = draw_layer_case(random, world()->size(), options, tokens, skew,
                                    random.pick(all_splits()), /*routing_from_outside=*/false);
  layer_case.balance_coefficient = layer_case.z_coefficient = 0;
  return layer_case;
}

/// With experts that have moved, where they may.
MoELayer make_placed_layer(const LayerCase& layer_case, const ParallelGroups& groups) {
  MoELayer layer(layer_case.options, groups.expert_parallel);
  if (layer_case.options.placement == "movable") {
    auto moved = layer->exchange().placement();
    for (auto& held : moved.held) {
      for (auto& each : held) each.expert = moved.num_experts - 1 - each.expert;
    }
    layer->place(moved);
  }
  set_parameters(layer, layer_case.parameters);
  return layer;
}

struct Found {
  std::vector<torch::Tensor> tensors;
  double not_finite = 0;  ///< as GradientReducer says
};

class PlacedGradients : public ::testing::Test {
 protected:
  /// Forward and backward, and the gradients finished, by `reducer` if there is one: the output, dx and all gradients.
  Found step(MoELayer& layer, const LayerCase& layer_case, const ParallelGroups& groups,
             GradientReducer* reducer = nullptr) const {
    layer->zero_grad();
    if (reducer != nullptr) reducer->start();
    const auto step = run_step(layer, layer_case, layer_case.counts, rank_);
    Found found{{step.output.output.detach(), step.x.grad()}};
    if (reducer != nullptr) {
      found.not_finite = reducer->finish().item<double>();
    } else {
      finish_gradients(*layer, groups);
    }
    for (const auto& parameter : layer->parameters()) {
      found.tensors.push_back(parameter.grad().clone());
    }
    return found;
  }

  static void expect_identical(const Found& found, const Found& expected) {
    ASSERT_EQ(found.tensors.size(), expected.tensors.size());
    for (size_t i = 0; i < found.tensors.size(); ++i) {
      EXPECT_TRUE(identical(found.tensors[i], expected.tensors[i])) << "tensor " << i;
    }
  }

  /// Output, dx and gradients of the dense reference, a rank's own parts of them, and their norm.
  void expect_mean_of_reference(const Found& found, const MoELayer& layer,
                                const LayerCase& layer_case, const ParallelGroups& groups) const {
    const double ranks = world_->size();
    const auto expected = run_reference(layer_case, world_->size());
    const StepLimits limits(layer_case, expected.scale, world_->size());
    const auto& options = layer_case.options;
    const auto mine = [&](const torch::Tensor& all) {
      return shard(all, layer_case.counts, rank_);
    };
    EXPECT_TRUE(close(found.tensors[0], mine(expected.result.output),
                      limits.output(expected.result.output)));
    EXPECT_TRUE(close(found.tensors[1], mine(expected.dx), limits.dx(expected.dx)));
    double squares = 0;
    double error = 0;  // of the norm, squared: at most that of the gradient
    for (const auto& parameter : parallel_parameters(*layer, groups)) {
      const auto& whole = expected.gradients.at(parameter.name);
      const auto exact = whole / ranks;
      const double limit = limits.gradient(parameter.name, whole) / ranks +
                           tolerance(options.dtype, 1, max_abs(exact));
      const auto wanted =
          parameter.is_expert
              ? part_of(exact, parameter.name, layer->exchange().placement(),
                        groups.expert_parallel->rank(), options.expert_hidden_size, options.glu)
              : exact;
      EXPECT_TRUE(close(parameter.tensor.grad(), wanted, limit)) << parameter.name;
      squares += exact.square().sum().item<double>();
      error += limit * limit * static_cast<double>(whole.numel());
    }
    EXPECT_NEAR(gradient_norm(*layer, groups), std::sqrt(squares), std::sqrt(error));
  }

  /// To half their norm, which is said; where there is none, to nothing else.
  void expect_clipped(MoELayer& layer, const ParallelGroups& groups) const {
    const double norm = gradient_norm(*layer, groups);
    std::vector<torch::Tensor> before;
    for (const auto& each : layer->parameters()) before.push_back(each.grad().clone());
    EXPECT_EQ(clip_gradient_norm(*layer, norm > 0 ? norm / 2 : 1, groups), norm);
    for (size_t i = 0; i < before.size(); ++i) {
      const auto half = before[i].to(torch::kCPU, torch::kFloat64) / 2;
      // The factor is rounded to the gradient's type, and so is the product; 16 bits have subnormal ones.
      EXPECT_TRUE(close(layer->parameters()[i].grad(), half,
                        tolerance(layer->options().dtype, 0, half.abs() + 1e-3, 2)));
    }
  }

  /// One number of one rank's loss is infinite.
  void expect_all_ranks_to_know(MoELayer& layer, LayerCase layer_case, const ParallelGroups& groups,
                                MoELayer& reduced, GradientReducer& reducer) const {
    layer_case.doutput = layer_case.doutput.clone();
    layer_case.doutput[layer_case.tokens - 1][0] = std::numeric_limits<double>::infinity();
    const auto found = step(layer, layer_case, groups);
    EXPECT_FALSE(std::all_of(found.tensors.begin() + 2, found.tensors.end(), [](const auto& each) {
      return each.isfinite().all().template item<bool>();
    }));
    EXPECT_FALSE(gradients_are_finite(*layer, groups));
    EXPECT_FALSE(std::isfinite(clip_gradient_norm(*layer, 1, groups, /*loss_scale=*/1.0)));
    const double said = step(reduced, layer_case, groups, &reducer).not_finite;
    EXPECT_EQ(std::isnan(said), world_->size() > 1);  // a rank alone has nobody to tell
  }

  void check(const LayerCase& layer_case, const ParallelGroups& groups) {
    auto layer = make_placed_layer(layer_case, groups);
    const Found first = step(layer, layer_case, groups);
    lent_ += layer->explain().find("weights of experts travel") != std::string::npos ? 1 : 0;
    rounds_ += layer->explain().find(" rounds, as") != std::string::npos ? 1 : 0;
    expect_mean_of_reference(first, layer, layer_case, groups);
    expect_clipped(layer, groups);
    auto reduced = make_placed_layer(layer_case, groups);
    GradientReducer reducer(*reduced, groups, random_.pick<int64_t>({1, 300, kBucketBytes}));
    expect_identical(step(reduced, layer_case, groups, &reducer), first);
    if (layer_case.tokens > 0 && random_.chance()) {
      expect_all_ranks_to_know(layer, layer_case, groups, reduced, reducer);
    }
    expect_identical(step(layer, layer_case, groups), first);
  }

  /// Every kind over all ranks, and some of them over fewer, whose experts the other groups have replicas of. `share`
  /// of these.
  void check_all(int64_t tokens, const std::vector<Skew>& skews, double share) {
    for (int64_t size = 1; size <= world_->size(); ++size) {
      if (world_->size() % size != 0) continue;
      size_t next = 0;
      for (auto options : kinds(random_, size)) {
        const double of_all = static_cast<double>(size) / static_cast<double>(world_->size());
        if (!random_.chance(share * of_all)) continue;
        options.dtype = random_.pick<torch::Dtype>(
            {torch::kFloat64, torch::kFloat64, torch::kFloat32, torch::kBFloat16});
        const auto layer_case = draw_case(random_, options, tokens, skews[next++ % skews.size()]);
        SCOPED_TRACE(c10::str("expert-parallel size ", size, ", ", layer_case.describe()));
        check(layer_case, parallel_groups(size));
      }
    }
  }

  std::shared_ptr<Communicator> world_ = world();
  int rank_ = world_->rank();
  Random random_{test_seed()};
  int64_t lent_ = 0;    ///< cases in which weights travelled
  int64_t rounds_ = 0;  ///< cases in rounds
};

TEST_F(PlacedGradients, AreTheMeanOfTheReferenceAndTheSameInEveryRun) {
  check_all(40 + 10 * world_->size(), {Skew::kOneExpert, Skew::kOneExpert, Skew::kZipf}, 1);
  if (world_->size() > 1) {
    EXPECT_GT(lent_, 0);
    EXPECT_GT(rounds_, 0);
  }
}

TEST_F(PlacedGradients, OfNoTokensAreZero) { check_all(0, {Skew::kUniform}, 0.3); }

}  // namespace
}  // namespace anabranch::test
