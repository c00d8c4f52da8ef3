#include <anabranch/parameters.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "support/sharded_model.h"
#include "support/thrown.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

std::vector<std::string> names(const std::vector<ParallelParameter>& parameters) {
  std::vector<std::string> result;
  for (const auto& parameter : parameters) result.push_back(parameter.name);
  return result;
}

TEST(Parameters, ListsEachTensorOnceInOrderOfRegistration) {
  const auto model = make_sharded_model({}, *world(), 1);
  const std::vector<std::string> expected{
      "gate",
      "frozen",
      "experts.up_weight",
      "experts.down_weight",
      "experts.up_bias",
      "experts.down_bias",
      "shared_expert.up_weight",
      "shared_expert.down_weight",
      "block.bias",
      "block.experts.up_weight",
      "block.experts.down_weight",
  };
  EXPECT_EQ(names(parallel_parameters(*model)), expected);
}

TEST(Parameters, TellsShardedFromReplicated) {
  for (const int64_t num_experts : {1, 2, 5, 8}) {
    const auto model = make_sharded_model({.num_experts = num_experts}, *world(), 1);
    const ExpertPlacement placement{num_experts, world()->size()};
    for (const auto& parameter : parallel_parameters(*model)) {
      const bool many = parameter.name.starts_with("experts.");
      const bool single = parameter.name.starts_with("block.experts.");
      EXPECT_EQ(parameter.is_expert, many || single) << parameter.name;
      EXPECT_EQ(parameter.num_experts, many ? num_experts : single ? 1 : 0) << parameter.name;
      if (many) {
        EXPECT_EQ(parameter.first_place, placement.first_place(world()->rank()));
        EXPECT_EQ(parameter.tensor.size(0), placement.local_experts(world()->rank()));
      }
    }
  }
}

TEST(Parameters, WalksAModelOnTheStack) {
  const ShardedModel model({}, 1, 0, 1);
  EXPECT_EQ(parallel_parameters(model).size(), 11u);
  EXPECT_TRUE(parallel_parameters(torch::nn::Module()).empty());
}

TEST(Parameters, GroupsAreConsecutiveRanksAndTheirReplicas) {
  const int ranks = world()->size();
  for (int size = 1; size <= ranks; ++size) {
    if (ranks % size != 0) continue;
    const auto groups = make_parallel_groups(world(), size);
    EXPECT_EQ(groups.world, world());
    EXPECT_EQ(groups.expert_parallel->size(), size);
    EXPECT_EQ(groups.expert_parallel->rank(), world()->rank() % size);
    EXPECT_EQ(groups.expert_replicas->size(), ranks / size);
    EXPECT_EQ(groups.expert_replicas->rank(), world()->rank() / size);
    const auto own = torch::tensor({int64_t{world()->rank()}});
    const auto members = groups.expert_parallel->all_gather(own).flatten();
    const int64_t first = world()->rank() / size * size;
    EXPECT_TRUE(members.equal(torch::arange(first, first + size)));
    const auto replicas = groups.expert_replicas->all_gather(own).flatten();
    EXPECT_TRUE(replicas.equal(torch::arange(world()->rank() % size, ranks, size)));
  }
}

TEST(Parameters, GroupsOfAllRanksByDefault) {
  const auto groups = make_parallel_groups(world());
  EXPECT_EQ(groups.expert_parallel->size(), world()->size());
  EXPECT_EQ(groups.expert_replicas->size(), 1);
}

TEST(Parameters, RefusesGroupsThatDoNotDivideTheWorld) {
  EXPECT_INPUT_ERROR(make_parallel_groups(nullptr), "no world");
  EXPECT_INPUT_ERROR(make_parallel_groups(world(), -1), "must divide");
  EXPECT_INPUT_ERROR(make_parallel_groups(world(), world()->size() + 1), "must divide");
  EXPECT_INPUT_ERROR(make_parallel_groups(world(), int64_t{1} << 40), "must divide");
}

TEST(Parameters, NamesTheRankThatWantsOtherGroups) {
  ANABRANCH_NEEDS_RANKS(2);
  const int64_t wanted = world()->rank() == 1 ? 1 : world()->size();
  const auto thrown = thrown_by([&] { make_parallel_groups(world(), wanted); });
  EXPECT_EQ(thrown.kind, Thrown::Kind::kCommunication) << thrown;
  EXPECT_TRUE(thrown.says("expert_parallel_size")) << thrown;
  EXPECT_EQ(thrown.peers, std::vector<int>{1});
}

TEST(Parameters, RefusesAModelOfOtherGroups) {
  ANABRANCH_NEEDS_RANKS(2);
  const auto groups = make_parallel_groups(world(), 1);
  const auto model = make_sharded_model({}, *world(), 1);
  EXPECT_INPUT_ERROR(parallel_parameters(*model, groups), "experts.up_weight holds experts");
}

}  // namespace
}  // namespace anabranch::test
