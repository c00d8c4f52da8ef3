// Gradients of the whole distributed layer against central differences of its own forward, in fp64.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>

#include "support/collectives.h"
#include "support/layer_case.h"
#include "support/tolerance.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

class GradcheckTest : public ::testing::Test {
 protected:
  void check(const MoEOptions& options, bool routing_from_outside);
  LayerCase draw(const MoEOptions& options, bool routing_from_outside);
  double loss_at(MoELayer& layer, const LayerCase& point);
  void expect_slope(MoELayer& layer, const LayerCase& point, const std::string& what,
                    const std::function<void(LayerCase&, double)>& move, double slope);

  std::shared_ptr<Communicator> world_ = world();
  int rank_ = world_->rank();
  Random random_{test_seed()};
};

// A step of u^(1/3) balances truncation, step² · f''' / 6, with rounding, u · f / step: both of the
// order of u^(2/3) times the size of what is differentiated.
const double kStep = std::cbrt(unit_roundoff(torch::kFloat64));

// No switch within reach of a step in a direction of unit-normal components.
constexpr double kReach = 1e-3;

LayerCase GradcheckTest::draw(const MoEOptions& options, bool routing_from_outside) {
  for (int i = 0; i < 10000; ++i) {
    auto drawn = draw_layer_case(random_, world_->size(), options, 7, Skew::kUniform,
                                 Split::kUneven, routing_from_outside);
    const auto dense = make_reference(drawn.parameters, options, drawn.expert_bias);
    if (dense.margin(drawn.x, !routing_from_outside) > kReach) {
      return drawn;
    }
  }
  throw std::runtime_error("no point away from a switch");
}

// Σ over ranks of their losses: what the gradients belong to.
double GradcheckTest::loss_at(MoELayer& layer, const LayerCase& point) {
  const torch::NoGradGuard no_grad;
  set_parameters(layer, point.parameters);
  const auto x = shard(point.x, point.counts, rank_);
  MoEOutput output;
  if (point.routing_from_outside) {
    Routing routing;
    routing.expert_ids = shard(point.expert_ids, point.counts, rank_);
    routing.weights = shard(point.weights, point.counts, rank_);
    output = layer->forward(x, routing);
  } else {
    output = layer->forward(x);
  }
  const auto loss = loss_of(point, output, shard(point.doutput, point.counts, rank_));
  return sum_over_ranks(*world_, loss.item<double>());
}

void GradcheckTest::expect_slope(MoELayer& layer, const LayerCase& point, const std::string& what,
                                 const std::function<void(LayerCase&, double)>& move,
                                 double slope) {
  auto above = point;
  auto below = point;
  move(above, kStep);
  move(below, -kStep);
  const double higher = loss_at(layer, above);
  const double lower = loss_at(layer, below);
  const double difference = (higher - lower) / (2 * kStep);
  // Sums over a few hundred terms along a direction of length √n: a factor of 1e3 on u^(2/3).
  const double allowed = 1e3 * kStep * kStep * (1 + std::abs(higher) + std::abs(slope));
  EXPECT_NEAR(slope, difference, allowed) << what;
}

void GradcheckTest::check(const MoEOptions& options, bool routing_from_outside) {
  const auto point = draw(options, routing_from_outside);
  SCOPED_TRACE(point.describe());
  auto layer = make_layer(point, world_);
  const auto step = run_step(layer, point, point.counts, rank_);
  const auto gradients = gather_gradients(layer, *world_);
  for (int direction_number = 0; direction_number < 2; ++direction_number) {
    const auto dx = random_.normal(point.x.sizes());
    const auto local_dx = shard(dx, point.counts, rank_);
    expect_slope(
        layer, point, "x", [&](LayerCase& at, double t) { at.x = at.x + t * dx; },
        sum_over_ranks(*world_, (step.x.grad() * local_dx).sum().item<double>()));
    if (routing_from_outside) {
      const auto dw = random_.normal(point.weights.sizes());
      const auto local_dw = shard(dw, point.counts, rank_);
      expect_slope(
          layer, point, "weights",
          [&](LayerCase& at, double t) { at.weights = at.weights + t * dw; },
          sum_over_ranks(*world_, (step.weights.grad() * local_dw).sum().item<double>()));
    }
    for (const auto& [name, gradient] : gradients) {
      const auto direction = random_.normal(gradient.sizes());
      expect_slope(
          layer, point, name,
          [&, key = name](LayerCase& at, double t) {
            at.parameters[key] = at.parameters.at(key) + t * direction;
          },
          (gradient * direction).sum().item<double>());
    }
  }
}

MoEOptions options_of(Activation activation, bool glu, bool bias, int64_t shared) {
  MoEOptions options;
  options.hidden_size = 5;
  options.expert_hidden_size = 4;
  options.num_experts = 5;
  options.top_k = 2;
  options.activation = activation;
  options.glu = glu;
  options.bias = bias;
  options.shared_expert_hidden_size = shared;
  options.dtype = torch::kFloat64;
  return options;
}

TEST_F(GradcheckTest, EveryActivation) {
  for (const auto activation : {Activation::kGeluTanh, Activation::kGelu, Activation::kSilu}) {
    for (const bool glu : {false, true}) {
      check(options_of(activation, glu, true, 3), false);
    }
  }
}

TEST_F(GradcheckTest, ReluAwayFromItsCorner) {
  // Few hidden values, so that a point exists whose are all away from 0.
  auto options = options_of(Activation::kRelu, false, true, 0);
  options.num_experts = 2;
  options.top_k = 1;
  options.renormalize = false;
  options.expert_hidden_size = 2;
  check(options, false);
  options.glu = true;
  check(options, false);
}

TEST_F(GradcheckTest, WithoutRenormalisation) {
  auto options = options_of(Activation::kGelu, false, false, 0);
  options.renormalize = false;
  check(options, false);
  options.top_k = 1;
  check(options, false);
}

TEST_F(GradcheckTest, TopKOfOneAndOfAll) {
  auto options = options_of(Activation::kSilu, true, true, 0);
  options.top_k = options.num_experts;
  check(options, false);
  options.top_k = 1;
  options.renormalize = false;
  check(options, false);
}

TEST_F(GradcheckTest, SigmoidScoresGroupsBiasAndScale) {
  auto options = options_of(Activation::kSilu, true, false, 3);
  options.router_score = RouterScore::kSigmoid;
  options.shared_expert_gate = true;
  options.routing_scale = 2.5;
  check(options, false);
  options.num_experts = 6;
  options.expert_groups = 3;
  options.top_groups = 2;
  options.expert_bias = true;
  check(options, false);
  options.renormalize = false;
  check(options, false);
  options.router_score = RouterScore::kSoftmax;
  options.group_score = GroupScore::kMaximum;
  check(options, false);
}

TEST_F(GradcheckTest, RoutingFromOutside) {
  check(options_of(Activation::kSilu, true, true, 3), true);
}

TEST_F(GradcheckTest, Recompute) {
  auto options = options_of(Activation::kGelu, true, true, 3);
  options.recompute = true;
  check(options, false);
}

}  // namespace
}  // namespace anabranch::test
