#include <anabranch/experts.h>
#include <gtest/gtest.h>

#include "support/devices.h"
#include "support/tolerance.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

MoEOptions options_with(bool glu, bool bias) {
  MoEOptions options;
  options.hidden_size = 12;
  options.expert_hidden_size = 10;
  options.num_experts = 7;
  options.glu = glu;
  options.bias = bias;
  options.seed = 11;
  options.device = device();
  return options;
}

TEST(ExpertsTest, ShapesFollowTheOptions) {
  for (const bool glu : {false, true}) {
    for (const bool bias : {false, true}) {
      const Experts experts(options_with(glu, bias), ExpertPlacement{7, 3}, 0);
      const int64_t up = glu ? 20 : 10;
      EXPECT_EQ(experts->up_weight.sizes(), torch::IntArrayRef({3, up, 12}));
      EXPECT_EQ(experts->down_weight.sizes(), torch::IntArrayRef({3, 12, 10}));
      EXPECT_EQ(experts->up_bias.defined(), bias);
      EXPECT_EQ(experts->down_bias.defined(), bias);
      EXPECT_EQ(experts->parameters().size(), bias ? 4U : 2U);
      if (bias) {
        EXPECT_EQ(experts->up_bias.sizes(), torch::IntArrayRef({3, up}));
        EXPECT_EQ(experts->down_bias.sizes(), torch::IntArrayRef({3, 12}));
      }
      EXPECT_EQ(experts->num_experts(), 7);
    }
  }
}

// The same experts at any number of ranks, in every type, whatever the global generator holds.
TEST(ExpertsTest, InitialValuesDependOnSeedAndGlobalNumberOnly) {
  for (const auto dtype : {torch::kFloat32, torch::kFloat64, torch::kBFloat16, torch::kFloat16}) {
    auto options = options_with(true, true);
    options.dtype = dtype;
    const Experts whole(options, ExpertPlacement{7, 1}, 0);
    for (const int64_t ranks : {2, 3, 7, 10}) {
      torch::manual_seed(static_cast<uint64_t>(ranks));
      std::map<std::string, std::vector<torch::Tensor>> parts;
      for (int64_t rank = 0; rank < ranks; ++rank) {
        const Experts part(options, ExpertPlacement{7, ranks}, rank);
        for (const auto& parameter : part->named_parameters()) {
          parts[parameter.key()].push_back(parameter.value().detach());
        }
      }
      for (const auto& parameter : whole->named_parameters()) {
        EXPECT_TRUE(identical(torch::cat(parts[parameter.key()]), parameter.value().detach()))
            << parameter.key() << " at " << ranks << " ranks";
      }
    }
  }
}

TEST(ExpertsTest, ExpertsDifferFromEachOtherAndBetweenSeeds) {
  auto options = options_with(false, true);
  const Experts first(options, ExpertPlacement{7, 1}, 0);
  options.seed = 12;
  const Experts second(options, ExpertPlacement{7, 1}, 0);
  for (const auto& parameter : first->named_parameters()) {
    const auto values = parameter.value().detach();
    EXPECT_FALSE(values.equal(second->named_parameters()[parameter.key()])) << parameter.key();
    for (int64_t e = 1; e < 7; ++e) {
      EXPECT_FALSE(values[e].equal(values[0])) << parameter.key() << " expert " << e;
    }
  }
}

// Uniform in ±1/√fan_in, as torch::nn::Linear: deviation 1/√(3 fan_in).
TEST(ExpertsTest, InitialValuesAreScaledByFanIn) {
  MoEOptions options;
  options.hidden_size = 64;
  options.expert_hidden_size = 100;
  options.num_experts = 4;
  options.device = device();
  const Experts experts(options, ExpertPlacement{4, 1}, 0);
  const auto expect_uniform = [](const torch::Tensor& values, double fan_in) {
    const double bound = 1 / std::sqrt(fan_in);
    const double deviation = bound / std::sqrt(3.0);
    const auto count = std::sqrt(static_cast<double>(values.numel()));
    EXPECT_LE(max_abs(values), bound * (1 + unit_roundoff(torch::kFloat32)));
    EXPECT_NEAR(values.mean().item<double>(), 0, 6 * deviation / count);
    EXPECT_NEAR(values.std().item<double>(), deviation, 6 * deviation / count);
  };
  expect_uniform(experts->up_weight.detach(), 64);
  expect_uniform(experts->down_weight.detach(), 100);
}

TEST(ExpertsTest, RanksBeyondTheExpertsOwnNone) {
  const Experts experts(options_with(false, true), ExpertPlacement{7, 9}, 8);
  EXPECT_EQ(experts->up_weight.size(0), 0);
  EXPECT_EQ(experts->parameters().size(), 4U);
}

TEST(ExpertPlacementTest, BlocksCoverAllExpertsOnce) {
  for (int64_t num_experts = 1; num_experts <= 20; ++num_experts) {
    for (int64_t ranks = 1; ranks <= 12; ++ranks) {
      const ExpertPlacement placement{num_experts, ranks};
      int64_t next = 0;
      for (int64_t rank = 0; rank < ranks; ++rank) {
        EXPECT_EQ(placement.first_place(rank), next);
        EXPECT_LE(placement.local_experts(rank), placement.local_experts(0));
        EXPECT_GE(placement.local_experts(rank), placement.local_experts(0) - 1);
        next += placement.local_experts(rank);
      }
      EXPECT_EQ(next, num_experts);
    }
  }
}

}  // namespace
}  // namespace anabranch::test
