// Steps whose counts the host does not learn: bit for bit those in which it does, as long as there is room; NaN
// and a late error on every rank where there is none, or where a rank refuses its routing.
#include <anabranch/error.h>
#include <anabranch/moe_layer.h>
#include <gtest/gtest.h>

#include <limits>

#include "support/devices.h"
#include "support/placements.h"
#include "support/random.h"
#include "support/random_routing.h"
#include "support/thrown.h"
#include "support/tolerance.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

constexpr int64_t kTokens = 61;
constexpr int64_t kHidden = 32;

MoEOptions options_of(double capacity) {
  MoEOptions options;
  options.hidden_size = kHidden;
  options.expert_hidden_size = 48;
  options.num_experts = 9;
  options.top_k = 3;
  options.glu = true;
  options.activation = Activation::kSilu;
  options.engine = "deterministic";
  options.device = device();
  options.receive_capacity = capacity;
  return options;
}

/// All that a step finds on this rank, and with what.
struct Found {
  std::vector<torch::Tensor> tensors;
  bool nan() const {
    return std::all_of(tensors.begin(), tensors.end(), [](const auto& tensor) {
      return tensor.isnan().all().template item<bool>();
    });
  }
};

class ReceiveCapacityTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!world_->reads_counts_on(device())) {
      GTEST_SKIP() << world_->name() << " does not read counts on " << device();
    }
  }

  /// The output and every gradient, of the same step whatever the capacity.
  Found step(MoELayer& layer, const torch::Tensor& x, const torch::Tensor& dy,
             const std::optional<Routing>& routing = {}) {
    auto leaf = x.detach().clone().requires_grad_();
    layer->zero_grad();
    const auto out = routing ? layer->forward(leaf, *routing) : layer->forward(leaf);
    auto loss = (out.output * dy).sum();
    if (out.balance_loss.defined()) loss = loss + 0.1 * out.balance_loss + 0.01 * out.z_loss;
    loss.backward();
    Found found{{out.output.detach(), leaf.grad()}};
    for (const auto& parameter : layer->parameters()) {
      if (parameter.grad().defined()) found.tensors.push_back(parameter.grad().clone());
    }
    return found;
  }
  torch::Tensor draw(torch::Dtype dtype = torch::kFloat32) {
    // Of each rank its own.
    const auto all = random_.normal({world_->size(), kTokens, kHidden}, dtype);
    return on_device(all[world_->rank()].contiguous());
  }
  Routing routing_of(const torch::Tensor& ids) {
    Routing routing;
    routing.expert_ids = on_device(ids.contiguous());
    routing.weights = on_device(torch::rand(ids.sizes()));
    return routing;
  }
  void expect_equal(const Found& found, const Found& expected) {
    ASSERT_EQ(found.tensors.size(), expected.tensors.size());
    for (size_t i = 0; i < found.tensors.size(); ++i) {
      EXPECT_TRUE(identical(found.tensors[i], expected.tensors[i])) << "tensor " << i;
    }
  }
  void expect_equal_steps(MoEOptions options) {
    options.receive_capacity = 0;
    MoELayer exact(options, world_);
    options.receive_capacity = world_->size();
    MoELayer bounded(options, world_);
    for (int turn = 0; turn < 3; ++turn) {
      const auto x = draw(options.dtype);
      const auto dy = draw(options.dtype);
      expect_equal(step(bounded, x, dy), step(exact, x, dy));
    }
    EXPECT_NO_THROW(check());
  }

  std::shared_ptr<Communicator> world_ = world();
  Random random_{test_seed()};
};

TEST_F(ReceiveCapacityTest, StepsEqualThoseThatWait) {
  auto options = options_of(0);
  expect_equal_steps(options);
  options.bias = true;
  options.recompute = true;
  options.dtype = torch::kBFloat16;
  expect_equal_steps(options);
  options.shared_expert_hidden_size = 24;
  options.shared_expert_gate = true;
  expect_equal_steps(options);
  options.placement =
      random_placement(random_, options.num_experts, world_->size(), options.expert_hidden_size)
          .describe();
  SCOPED_TRACE(options.placement);
  expect_equal_steps(options);
}

TEST_F(ReceiveCapacityTest, StepsOfATokenWithFewerExpertsEqualThoseThatWait) {
  MoELayer exact(options_of(0), world_);
  MoELayer bounded(options_of(world_->size()), world_);
  const auto x = draw();
  const auto dy = draw();
  for (int turn = 0; turn < 8; ++turn) {
    auto ids = random_expert_ids(random_, kTokens, 9, 3, Skew::kUniform);
    if (turn % 4 == 1) {
      ids = torch::arange(3).expand({kTokens, 3}).contiguous();  // all for rank 0
    } else if (turn % 4 == 2) {
      ids.masked_fill_(torch::rand(ids.sizes()) < 0.5, -1);
    } else if (turn % 4 == 3) {
      ids.fill_(-1);
    }
    auto routing = routing_of(ids);
    routing.may_skip = true;
    expect_equal(step(bounded, x, dy, routing), step(exact, x, dy, routing));
  }
  EXPECT_NO_THROW(check());
}

TEST_F(ReceiveCapacityTest, WhatExceedsItIsNaNOnAllRanksAndHeardLate) {
  ANABRANCH_NEEDS_RANKS(2);
  MoELayer exact(options_of(0), world_);
  MoELayer bounded(options_of(1.25), world_);
  const auto x = draw();
  const auto dy = draw();
  const auto all_for_the_last = routing_of(torch::arange(6, 9).expand({kTokens, 3}));
  EXPECT_TRUE(step(bounded, x, dy, all_for_the_last).nan());
  EXPECT_THROW(check(), CapacityError);
  EXPECT_NO_THROW(check());
  // The next step is none the worse for it.
  const auto even = routing_of(torch::arange(kTokens * 3).remainder(9).view({kTokens, 3}));
  expect_equal(step(bounded, x, dy, even), step(exact, x, dy, even));
}

TEST_F(ReceiveCapacityTest, RunDoesWhatExceedsItAgain) {
  MoELayer exact(options_of(0), world_);
  MoELayer bounded(options_of(1.25), world_);
  const auto x = draw();
  const auto dy = draw();
  for (const bool skewed : {true, false, true}) {
    const auto routing = routing_of(skewed ? torch::arange(6, 9).expand({kTokens, 3})
                                           : torch::arange(kTokens * 3).remainder(9).view({-1, 3}));
    int steps = 0;
    const auto found = run([&] { return ++steps, step(bounded, x, dy, routing); },
                           [&] { return ++steps, step(bounded, x, dy, routing); });
    EXPECT_EQ(steps, skewed && world_->size() > 1 ? 2 : 1);
    expect_equal(found, step(exact, x, dy, routing));
    EXPECT_FALSE(Unbounded::lives());
  }
  EXPECT_NO_THROW(check());
}

TEST_F(ReceiveCapacityTest, RefusalsAreHeardLateOnAllRanks) {
  ANABRANCH_NEEDS_RANKS(2);
  const int culprit = world_->size() - 1;
  MoELayer layer(options_of(world_->size()), world_);
  const auto good = draw();
  auto bad = good.clone();
  if (world_->rank() == culprit) {
    bad[7][3] = std::numeric_limits<float>::quiet_NaN();
  }
  const auto out = layer->forward(bad).output;
  EXPECT_TRUE(out.isnan().all().item<bool>());
  const auto thrown = thrown_by([] { check(); });
  if (world_->rank() == culprit) {
    EXPECT_EQ(thrown.kind, Thrown::Kind::kInput) << thrown;
    EXPECT_TRUE(thrown.says("token 7")) << thrown;
  } else {
    EXPECT_EQ(thrown.kind, Thrown::Kind::kCommunication) << thrown;
    EXPECT_EQ(thrown.peers, std::vector<int>{culprit}) << thrown;
  }
  EXPECT_FALSE(layer->forward(good).output.isnan().any().item<bool>());
  EXPECT_NO_THROW(check());
}

TEST_F(ReceiveCapacityTest, RefusesWhatIsNone) {
  for (const double wrong :
       {-1.0, std::numeric_limits<double>::infinity(), std::numeric_limits<double>::quiet_NaN()}) {
    EXPECT_INPUT_ERROR(MoELayer(options_of(wrong), world_), "receive_capacity");
  }
  auto options = options_of(1);
  options.errors = Errors::kAtCall;
  EXPECT_INPUT_ERROR(MoELayer(options, world_), "at_call");
}

}  // namespace
}  // namespace anabranch::test
