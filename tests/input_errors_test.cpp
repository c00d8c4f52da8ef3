// What a layer refuses, what it says, and that it works again afterwards.
#include <anabranch/moe_layer.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <set>
#include <type_traits>

#include "option_fields.h"
#include "support/devices.h"
#include "support/random_routing.h"
#include "support/thrown.h"
#include "support/tolerance.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

MoEOptions good_options() {
  MoEOptions options;
  options.hidden_size = 8;
  options.expert_hidden_size = 6;
  options.num_experts = 5;
  options.top_k = 2;
  options.device = device();
  options.errors = Errors::kAtCall;
  return options;
}

class InputErrorsTest : public ::testing::Test {
 protected:
  using Change = std::function<void(MoEOptions&)>;

  // On every rank alike: each refuses before it communicates.
  void expect_refused(const Change& change, const std::string& text) {
    auto options = good_options();
    change(options);
    const auto before = world_->traffic().collectives;
    EXPECT_INPUT_ERROR(MoELayer(options, world_), text);
    EXPECT_EQ(world_->traffic().collectives, before) << text;
  }
  void expect_disagreement(const std::string& name, int culprit);
  void expect_works(MoELayer& layer) {
    const auto output = layer->forward(on_device(random_.normal({3, 8}, torch::kFloat32))).output;
    EXPECT_TRUE(output.isfinite().all().item<bool>());
  }
  // `bad` on the last rank, `good` on the others.
  void expect_refused_everywhere(MoELayer& layer, const std::function<void()>& bad,
                                 const std::function<void()>& good, const std::string& text) {
    const int culprit = world_->size() - 1;
    const auto thrown = thrown_by(rank_ == culprit ? bad : good);
    if (rank_ == culprit) {
      EXPECT_EQ(thrown.kind, Thrown::Kind::kInput) << thrown;
      EXPECT_TRUE(thrown.says(text)) << "expected to read \"" << text << "\" in: " << thrown;
    } else {
      EXPECT_EQ(thrown.kind, Thrown::Kind::kCommunication) << thrown;
      EXPECT_EQ(thrown.peers, std::vector<int>{culprit}) << thrown;
      EXPECT_TRUE(thrown.says("rank " + std::to_string(culprit))) << thrown;
    }
    expect_works(layer);
  }

  std::shared_ptr<Communicator> world_ = world();
  int rank_ = world_->rank();
  Random random_{test_seed()};
};

TEST_F(InputErrorsTest, OptionsOutOfRange) {
  for (const int64_t value : {int64_t{0}, int64_t{-1}, std::numeric_limits<int64_t>::min()}) {
    expect_refused([&](MoEOptions& o) { o.hidden_size = value; }, "hidden_size");
    expect_refused([&](MoEOptions& o) { o.expert_hidden_size = value; }, "expert_hidden_size");
    expect_refused([&](MoEOptions& o) { o.num_experts = value; }, "num_experts");
    expect_refused([&](MoEOptions& o) { o.top_k = value; }, "top_k");
  }
  expect_refused([](MoEOptions& o) { o.top_k = 6; }, "top_k");
  expect_refused([](MoEOptions& o) { o.shared_expert_hidden_size = -1; },
                 "shared_expert_hidden_size");
  for (const double value : {-0.1, 1.0, 2.0, std::nan(""), HUGE_VAL}) {
    expect_refused([&](MoEOptions& o) { o.jitter = value; }, "jitter");
  }
  for (const double value : {0.0, -1.0, std::nan(""), HUGE_VAL}) {
    expect_refused([&](MoEOptions& o) { o.routing_scale = value; }, "routing_scale");
  }
  expect_refused([](MoEOptions& o) { o.shared_expert_gate = true; }, "shared_expert_gate");
  for (const auto dtype : {torch::kInt64, torch::kBool, torch::kComplexFloat}) {
    expect_refused([&](MoEOptions& o) { o.dtype = dtype; }, "dtype");
  }
}

TEST_F(InputErrorsTest, GroupsThatDoNotFit) {
  for (const int64_t groups : {-1, 0, 2, 33}) {  // of 5 experts
    expect_refused([&](MoEOptions& o) { o.expert_groups = groups; }, "expert_groups");
  }
  const auto refuse = [&](int64_t experts, int64_t groups, int64_t top_groups,
                          const std::string& text) {
    expect_refused(
        [&](MoEOptions& o) {
          o.num_experts = experts;
          o.expert_groups = groups;
          o.top_groups = top_groups;
        },
        text);
  };
  refuse(66, 33, 2, "expert_groups = 33");
  refuse(6, 2, 0, "top_groups = 0");
  refuse(6, 2, 3, "top_groups = 3 of 2");
  refuse(6, 6, 1, "top_k = 2 from top_groups = 1");
  refuse(6, 6, 2, "groups of one expert");
}

TEST_F(InputErrorsTest, GatesThatGoWithNoOtherRules) {
  for (const auto& [gate, name] :
       std::vector<std::pair<Gate, std::string>>{{Gate::kNoisyTopK, "noisy_top_k"},
                                                 {Gate::kGShard, "gshard"},
                                                 {Gate::kSinkhorn, "sinkhorn"}}) {
    const auto refuse = [&](const Change& change) {
      expect_refused(
          [&](MoEOptions& o) {
            o.gate = gate;
            o.num_experts = 6;
            change(o);
          },
          name);
    };
    if (gate != Gate::kSinkhorn) {
      refuse([](MoEOptions& o) { o.router_score = RouterScore::kSigmoid; });
    }
    refuse([](MoEOptions& o) { o.expert_bias = true; });
    refuse([](MoEOptions& o) { o.expert_groups = 2; });
  }
  expect_refused(
      [](MoEOptions& o) {
        o.gate = Gate::kGShard;
        o.top_k = 1;
      },
      "top_k = 1");
  expect_refused(
      [](MoEOptions& o) {
        o.gate = Gate::kGShard;
        o.renormalize = false;
      },
      "renormalize");
}

TEST_F(InputErrorsTest, ARouterThatWouldNotLearn) {
  expect_refused([](MoEOptions& o) { o.top_k = 1; }, "renormalize = false");
  auto options = good_options();
  options.top_k = 1;
  options.renormalize = false;
  MoELayer layer(options, world_);
  const auto x = on_device(random_.normal({9, 8}, torch::kFloat32));
  layer->forward(x).output.square().sum().backward();
  const auto gradient = layer->named_parameters()["router.weight"].grad();
  EXPECT_GT(gradient.abs().max().item<double>(), 0);
  options.num_experts = 1;  // there is nothing to learn
  options.renormalize = true;
  MoELayer(options, world_);
}

// The sizes alone make a layer.
TEST_F(InputErrorsTest, DefaultsTrainTheRouter) {
  MoEOptions options;
  options.hidden_size = 8;
  options.expert_hidden_size = 6;
  options.num_experts = 5;
  options.device = device();
  MoELayer layer(options, world_);
  layer->forward(on_device(random_.normal({9, 8}, torch::kFloat32)))
      .output.square()
      .sum()
      .backward();
  const auto gradient = layer->named_parameters()["router.weight"].grad();
  EXPECT_GT(gradient.abs().max().item<double>(), 0);
}

// Products of sizes that no 64-bit number holds are refused as such, not wrapped into small ones.
TEST_F(InputErrorsTest, SizesThatOverflow) {
  constexpr int64_t kHuge = int64_t{1} << 32;
  expect_refused(
      [](MoEOptions& o) {
        o.hidden_size = kHuge;
        o.expert_hidden_size = kHuge;
      },
      "overflow");
  expect_refused(
      [](MoEOptions& o) {
        o.num_experts = kHuge;
        o.expert_hidden_size = kHuge;
      },
      "overflow");
  expect_refused([](MoEOptions& o) { o.hidden_size = std::numeric_limits<int64_t>::max(); },
                 "overflow");
  expect_refused(
      [](MoEOptions& o) {
        o.shared_expert_hidden_size = kHuge;
        o.hidden_size = kHuge;
      },
      "overflow");
  // [E, h], the router's.
  expect_refused(
      [](MoEOptions& o) {
        o.num_experts = int64_t{1} << 31;
        o.hidden_size = int64_t{1} << 30;
        o.expert_hidden_size = 1;
      },
      "overflow");
}

TEST_F(InputErrorsTest, UnknownEngineAndDevice) {
  auto options = good_options();
  options.engine = "abacus";
  EXPECT_INPUT_ERROR(MoELayer(options, world_), "abacus");
  options = good_options();
  options.device = torch::kMeta;
  EXPECT_INPUT_ERROR(MoELayer(options, world_), "meta");
}

TEST_F(InputErrorsTest, WrongInputIsRefusedBeforeCommunication) {
  MoELayer layer(good_options(), world_);
  const auto before = world_->traffic().collectives;
  EXPECT_INPUT_ERROR(layer->forward(torch::Tensor()), "undefined");
  EXPECT_INPUT_ERROR(layer->forward(on_device(torch::zeros({3, 7}))), "hidden_size = 8");
  EXPECT_INPUT_ERROR(layer->forward(on_device(torch::zeros({8, 3}))), "[8, 3]");
  EXPECT_INPUT_ERROR(layer->forward(on_device(torch::zeros({}))), "[]");
  EXPECT_INPUT_ERROR(layer->forward(on_device(torch::zeros({3, 8}, torch::kFloat64))), "Double");
  EXPECT_INPUT_ERROR(layer->forward(on_device(torch::zeros({3, 8}, torch::kBFloat16))), "BFloat16");
  EXPECT_INPUT_ERROR(layer->forward(on_device(torch::zeros({3, 8}, torch::kInt32))), "Int");
  EXPECT_INPUT_ERROR(layer->forward(torch::zeros({3, 8}, torch::kMeta)), "meta");
  EXPECT_EQ(world_->traffic().collectives, before);
  expect_works(layer);
}

TEST_F(InputErrorsTest, WrongRoutingIsRefusedBeforeCommunication) {
  MoELayer layer(good_options(), world_);
  const auto x = on_device(torch::zeros({3, 8}));
  Routing good;
  good.expert_ids = on_device(torch::tensor({{0, 1}, {2, 3}, {4, 0}}));
  good.weights = on_device(torch::ones({3, 2}));
  const auto before = world_->traffic().collectives;
  const auto refuse = [&](const std::function<void(Routing&)>& change, const std::string& text) {
    auto routing = good;
    change(routing);
    EXPECT_INPUT_ERROR(layer->forward(x, routing), text);
  };
  refuse([](Routing& r) { r.expert_ids = torch::Tensor(); }, "expert_ids");
  refuse([](Routing& r) { r.weights = torch::Tensor(); }, "weights");
  refuse([](Routing& r) { r.expert_ids = r.expert_ids.slice(0, 0, 2); }, "[2, 2]");
  refuse([](Routing& r) { r.expert_ids = r.expert_ids.slice(1, 0, 1); }, "[3, 1]");
  refuse([](Routing& r) { r.expert_ids = r.expert_ids.flatten(); }, "[6]");
  refuse([](Routing& r) { r.expert_ids = r.expert_ids.to(torch::kInt32); }, "Int");
  refuse([](Routing& r) { r.expert_ids = r.expert_ids.to(torch::kFloat32); }, "Float");
  refuse([](Routing& r) { r.expert_ids = r.expert_ids.to(torch::kMeta); }, "meta");
  refuse([](Routing& r) { r.weights = r.weights.to(torch::kMeta); }, "meta");
  refuse([](Routing& r) { r.weights = r.weights.to(torch::kFloat64); }, "Double");
  refuse([](Routing& r) { r.weights = r.weights.to(torch::kBFloat16); }, "BFloat16");
  refuse([](Routing& r) { r.weights = r.weights.slice(0, 0, 2); }, "[2, 2]");
  refuse([](Routing& r) { r.weights = r.weights.flatten(); }, "[6]");
  EXPECT_EQ(world_->traffic().collectives, before);
  expect_works(layer);
}

// A gate that is not finite is named on every rank and never routed.
TEST_F(InputErrorsTest, NonFiniteGate) {
  MoELayer layer(good_options(), world_);
  auto gate = layer->named_parameters()["router.weight"];
  {
    const torch::NoGradGuard no_grad;
    gate[2].fill_(1);
  }
  const auto good = on_device(random_.normal({6, 8}, torch::kFloat32));
  for (const float value :
       {std::nanf(""), std::numeric_limits<float>::infinity(), -HUGE_VALF, 3e38F}) {
    SCOPED_TRACE(value);
    auto bad = good.clone();
    bad[4].fill_(value);  // 3e38 is finite, but eight of them overflow in the gate
    expect_refused_everywhere(
        layer, [&] { layer->forward(bad); }, [&] { layer->forward(good); }, "token 4");
  }
  // The gate itself: every rank refuses its own tokens.
  {
    const torch::NoGradGuard no_grad;
    gate[2].fill_(std::nanf(""));
  }
  EXPECT_INPUT_ERROR(layer->forward(good), "token 0");
}

TEST_F(InputErrorsTest, InvalidRoutingFromOutside) {
  MoELayer layer(good_options(), world_);
  const auto x = on_device(random_.normal({3, 8}, torch::kFloat32));
  Routing good;
  good.expert_ids = on_device(torch::tensor({{0, 1}, {2, 3}, {4, 0}}));
  good.weights = on_device(torch::ones({3, 2}));
  const auto expect_bad = [&](const std::function<void(Routing&)>& change) {
    Routing bad = good;
    bad.expert_ids = good.expert_ids.clone();
    bad.weights = good.weights.clone();
    change(bad);
    expect_refused_everywhere(
        layer, [&] { layer->forward(x, bad); }, [&] { layer->forward(x, good); }, "token 1");
  };
  expect_bad([](Routing& r) { r.expert_ids[1][0] = 5; });
  expect_bad([](Routing& r) { r.expert_ids[1][1] = -1; });
  expect_bad([](Routing& r) { r.expert_ids[1][1] = std::numeric_limits<int64_t>::min(); });
  expect_bad([](Routing& r) { r.expert_ids[1][0] = 3; });  // twice
  expect_bad([](Routing& r) { r.weights[1][0] = std::nanf(""); });
  expect_bad([](Routing& r) { r.weights[1][1] = HUGE_VALF; });
}

// Strides of routing from outside do not matter. (LibTorch itself has no negative strides.)
TEST_F(InputErrorsTest, StridedRoutingIsHandled) {
  MoELayer layer(good_options(), world_);
  const auto x = on_device(random_.normal({4, 8}, torch::kFloat32));
  Routing plain;
  plain.expert_ids = on_device(random_expert_ids(random_, 4, 5, 2, Skew::kUniform));
  plain.weights = on_device(random_.uniform({4, 2}, torch::kFloat32));
  Routing strided;
  strided.expert_ids = plain.expert_ids.t().contiguous().t();
  strided.weights = plain.weights.t().contiguous().t();
  ASSERT_FALSE(strided.weights.is_contiguous());
  EXPECT_TRUE(identical(layer->forward(x, strided).output, layer->forward(x, plain).output));
  strided.expert_ids = on_device(torch::tensor({{3, 1}})).expand({4, 2});
  for (const auto& weights : {torch::tensor({{0.25F, 0.75F}}), torch::tensor({{0.5F}}),
                              random_.uniform({4, 1}, torch::kFloat32)}) {
    strided.weights = on_device(weights).expand({4, 2});
    plain.expert_ids = strided.expert_ids.contiguous();
    plain.weights = strided.weights.contiguous();
    EXPECT_TRUE(identical(layer->forward(x, strided).output, layer->forward(x, plain).output));
  }
}

/// Options that still go together when `field` alone changes.
MoEOptions options_around(const std::string& field) {
  auto options = good_options();
  options.num_experts = 6;
  options.expert_groups = field == "top_groups" ? 2 : 1;
  options.shared_expert_hidden_size = field == "shared_expert_gate" ? 4 : 0;
  options.balance_coefficient = field == "attach_losses" ? 0.01 : 0;
  options.glu = field == "glu_offset";
  options.expert_bias = field == "expert_bias_update";
  if (field == "receive_capacity") options.errors = Errors::kLate;
  return options;
}

template <typename T>
void change(const std::string& field, T& value) {
  if constexpr (std::is_same_v<T, bool>) {
    value = !value;
  } else if constexpr (NamedEnum<T>) {
    const auto names = names_of(value);
    value = names[value == names[0].second ? 1 : 0].second;
  } else if constexpr (std::is_same_v<T, std::string>) {
    value = field == "placement" ? "sliced"
            : value != "off"     ? value + "_2"
            : field == "balance" ? "shadow"
                                 : "1";
  } else if constexpr (std::is_same_v<T, torch::Dtype>) {
    value = torch::kBFloat16;
  } else if constexpr (std::is_same_v<T, torch::Device>) {
    value = value.is_cpu() ? torch::kCUDA : torch::kCPU;
  } else if constexpr (std::is_floating_point_v<T>) {
    value += 1e-9;
  } else {
    ++value;
  }
}

void InputErrorsTest::expect_disagreement(const std::string& name, int culprit) {
  SCOPED_TRACE(name + " differs on rank " + std::to_string(culprit));
  auto options = options_around(name);
  if (rank_ == culprit) {
    for_each_field(options, [&](const char* field, auto& value) {
      if (name == field) change(name, value);
    });
  }
  const auto thrown = thrown_by([&] { MoELayer(options, world_); });
  EXPECT_EQ(thrown.kind, Thrown::Kind::kCommunication) << thrown;
  EXPECT_EQ(thrown.peers, std::vector<int>{culprit}) << thrown;
  EXPECT_TRUE(thrown.says(name + " = ")) << thrown;
  EXPECT_TRUE(thrown.says("rank " + std::to_string(culprit))) << thrown;
}

// Each of them: what is not compared differs in silence.
TEST_F(InputErrorsTest, OptionsThatDifferBetweenRanksAreNamed) {
  ANABRANCH_NEEDS_RANKS(2);
  std::set<std::string> fields;
  for_each_field(MoEOptions(), [&](const char* field, const auto&) { fields.insert(field); });
  EXPECT_EQ(fields.size(), std::tuple_size_v<decltype(kOptionFields)>) << "a name stands twice";
  for (const auto& field : fields) {
    expect_disagreement(field, world_->size() - 1);
  }
  expect_disagreement("top_k", 1);
  MoELayer layer(good_options(), world_);
  expect_works(layer);
}

TEST(ImbalanceErrorsTest, RefusesWhatIsNoLoad) {
  EXPECT_INPUT_ERROR(imbalance(torch::Tensor()), "load");
  EXPECT_INPUT_ERROR(imbalance(torch::zeros({2, 2}, torch::kInt64)), "load");
  EXPECT_INPUT_ERROR(imbalance(torch::zeros({0}, torch::kInt64)), "load");
}

}  // namespace
}  // namespace anabranch::test
