// Experts anywhere, and in slices. That layers of them compute what the dense reference does is among the cases of
// moe_layer_test.
#include <anabranch/checkpoint.h>
#include <anabranch/moe_layer.h>
#include <anabranch/optimizers.h>
#include <gtest/gtest.h>

#include "placement/nodes.h"
#include "support/devices.h"
#include "support/placements.h"
#include "support/shared_directory.h"
#include "support/thrown.h"
#include "support/tolerance.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

TEST(ExpertPlacement, SaysWhichExpertsLieOnANode) {
  const auto placement = ExpertPlacement::parse("0,3;2/0:2;2/1:2,1", 4, 3);
  const auto experts = [&](const std::vector<int>& nodes, int64_t rank) {
    return experts_of_node(placement, nodes, rank).nonzero().flatten();
  };
  EXPECT_TRUE(experts({0, 0, 0}, 1).equal(torch::arange(4)));
  EXPECT_TRUE(experts({0, 1, 1}, 0).equal(torch::tensor({0, 3})));
  EXPECT_TRUE(experts({0, 1, 1}, 2).equal(torch::tensor({1, 2})));
  EXPECT_TRUE(
      experts({0, 1, 0}, 2).equal(torch::tensor({0, 1, 3})));  // of 2 a slice lies elsewhere
}

TEST(ExpertPlacement, SlicesShareOutRanksEvenly) {
  EXPECT_TRUE(ExpertPlacement::sliced(4, 4).is_blocks());
  EXPECT_EQ(ExpertPlacement::sliced(2, 4).describe(), "0/0:2;0/1:2;1/0:2;1/1:2");
  for (int64_t experts = 1; experts <= 5; ++experts) {
    for (int64_t ranks = experts + 1; ranks <= 20; ++ranks) {
      const auto placement = ExpertPlacement::sliced(experts, ranks);
      EXPECT_NO_THROW(check_placement(placement));
      EXPECT_EQ(placement.num_places(), ranks);
      EXPECT_EQ(placement.most_slices(), (ranks + experts - 1) / experts);
      for (int64_t rank = 0; rank < ranks; ++rank) {
        EXPECT_EQ(placement.local_experts(rank), 1);
        EXPECT_GE(placement.at(rank, 0).slices, ranks / experts);
      }
    }
  }
}

TEST(ExpertPlacement, NumbersPlacesByRank) {
  Random random(test_seed());
  for (int i = 0; i < 50; ++i) {
    const auto placement = random_placement(random, random.integer(1, 9), random.integer(1, 9), 12);
    check_placement(placement);
    EXPECT_EQ(
        ExpertPlacement::parse(placement.describe(), placement.num_experts, placement.num_ranks)
            .all(),
        placement.all());
    int64_t place = 0;
    for (int64_t rank = 0; rank < placement.num_ranks; ++rank) {
      EXPECT_EQ(placement.first_place(rank), place);
      for (int64_t local = 0; local < placement.local_experts(rank); ++local, ++place) {
        EXPECT_EQ(placement.rank_of(place), rank);
        const HeldExpert held = placement.at(rank, local);
        EXPECT_EQ(placement.all()[place], held);
        EXPECT_EQ(placement.place_of_experts()[held.expert] == place, held.slice == 0);
      }
    }
    EXPECT_EQ(placement.num_places(), place);
  }
}

void expect_refused(std::vector<std::vector<HeldExpert>> held, int64_t hidden, const char* text) {
  const ExpertPlacement placement{2, 2, std::move(held)};
  const auto check = [&] {
    check_placement(placement);
    check_slices(placement, hidden);
  };
  EXPECT_INPUT_ERROR(check(), text);
}

TEST(ExpertPlacement, RefusesWhatIsNotAllExpertsOnce) {
  expect_refused({{{0}}}, 4, "of 1 ranks, expected 2");
  expect_refused({{{0}}, {{2}}}, 4, "of expert 2, where there are 2 experts");
  expect_refused({{{0}}, {{1, 2, 2}}}, 4, "slice 2 of 2");
  expect_refused({{{0}}, {}}, 4, "expert 1 is not there exactly once");
  expect_refused({{{0}, {1}}, {{1}}}, 4, "expert 1 is not there exactly once");
  expect_refused({{{0}}, {{1, 0, 2}}}, 4, "expert 1 is not there exactly once");
  expect_refused({{{0, 0, 2}, {0, 1, 2}}, {{1}}}, 4, "rank 0 holds expert 0 twice");
  expect_refused({{{0, 0, 2}, {1}}, {{0, 1, 2}}}, 4, "of different widths");
  expect_refused({{{0, 0, 2}}, {{0, 1, 2}, {1}}}, 1, "2 slices of an expert of hidden size 1");
}

TEST(ExpertPlacement, RefusesTextsThatSayNone) {
  for (const char* text : {"", "block", "0,1", "0;1;", "0;1,", "0;,1", "0;-1", "0; 1", "0;1/0",
                           "0;1/0:", "0;1/0:1:1", "0;1/0:2", "0;2", "0;99999999999999999999"}) {
    SCOPED_TRACE(text);
    EXPECT_THROW(ExpertPlacement::parse(text, 2, 2), InputError);
  }
  EXPECT_INPUT_ERROR(ExpertPlacement::parse("0;1.", 2, 2), "expected ',' or ';' before '.'");
  EXPECT_TRUE(ExpertPlacement::parse("blocks", 2, 2).is_blocks());
  EXPECT_EQ(ExpertPlacement::parse(";1,0", 2, 2).at(1, 1), HeldExpert{0});
}

MoEOptions options_of(Random& random) {
  MoEOptions options;
  options.hidden_size = 5;
  options.expert_hidden_size = 12;
  options.num_experts = random.pick<int64_t>({1, 2, 3, 5});
  options.top_k = 1;
  options.renormalize = false;
  options.shared_expert_hidden_size = 3;
  options.glu = options.bias = true;
  options.device = device();
  options.seed = random.next();
  return options;
}

/// The same layer, its experts anywhere over so many ranks.
MoEOptions placed(MoEOptions options, Random& random, int64_t ranks) {
  options.placement =
      random_placement(random, options.num_experts, ranks, options.expert_hidden_size).describe();
  return options;
}

/// What `rank` has of `whole`, a parameter of the layer that holds all experts.
torch::Tensor held_part(const torch::Tensor& whole, const ParallelParameter& parameter,
                        const MoELayer& layer) {
  const auto& exchange = layer->exchange();
  const auto& options = layer->options();
  return parameter.is_expert
             ? part_of(whole, parameter.name, exchange.placement(), exchange.communicator().rank(),
                       options.expert_hidden_size, options.glu)
             : whole;
}

TEST(PlacedLayer, IsThatOfItsSeed) {
  Random random(test_seed());
  for (int i = 0; i < 8; ++i) {
    const auto options = options_of(random);
    const auto whole = MoELayer(options)->named_parameters();
    const MoELayer layer(placed(options, random, world()->size()), world());
    SCOPED_TRACE(layer->options().placement);
    for (const auto& parameter : parallel_parameters(*layer, parallel_groups())) {
      const auto wanted = held_part(whole[parameter.name].detach(), parameter, layer);
      EXPECT_TRUE(identical(parameter.tensor.detach(), wanted)) << parameter.name;
    }
  }
}

TEST(PlacedLayer, RefusesPlacementsThatDifferAndBalanceOfSlices) {
  ANABRANCH_NEEDS_RANKS(2);
  Random random(test_seed());
  auto options = options_of(random);
  options.num_experts = 1;
  options.placement = std::string(world()->rank(), ';') + "0" +
                      std::string(world()->size() - 1 - world()->rank(), ';');  // the own rank's
  EXPECT_THROW(MoELayer(options, world()), CommunicationError);
  options.placement = "sliced";
  options.balance = "shadow";
  EXPECT_INPUT_ERROR(MoELayer(options, world()), "in slices, expected off");
  options.balance = "off";
  options.expert_hidden_size = world()->size() - 1;
  EXPECT_INPUT_ERROR(MoELayer(options, world()), "of hidden size");
}

/// A layer and an optimizer of it, of which some parts may lie elsewhere.
struct Trained {
  Trained(const MoEOptions& options, const ParallelGroups& groups, bool sharded)
      : layer(options, groups.expert_parallel), parameters(trained_parameters(*layer, groups)) {
    const OptimizerMaker make = [](const std::vector<ParallelParameter>& of) {
      return make_adamw(of, {});
    };
    optimizer = sharded ? make_sharded_optimizer(parameters, groups, make) : make(parameters);
  }
  /// With gradients that are parts of those of all experts.
  void step(uint64_t seed, const std::map<std::string, std::vector<int64_t>>& shapes) {
    Random random(seed);
    std::map<std::string, torch::Tensor> wholes;
    for (const auto& [name, shape] : shapes)
      wholes[name] = random.normal(shape, layer->options().dtype);
    for (auto& parameter : parameters) {
      const auto part = held_part(wholes.at(parameter.name), parameter, layer);
      parameter.tensor.mutable_grad() = on_device(part.contiguous());
    }
    optimizer->step(0.01, torch::ones({}, torch::dtype(torch::kFloat64).device(device())));
  }

  MoELayer layer;
  std::vector<ParallelParameter> parameters;
  std::unique_ptr<ParallelOptimizer> optimizer;
};

// Whatever lies where: what comes out of the checkpoint is what one rank that holds everything has computed.
TEST(PlacedLayer, LoadsWhatWasSavedFromAnyOtherPlacement) {
  Random random(test_seed());
  for (int i = 0; i < 6; ++i) {
    const auto options = options_of(random);
    const auto& groups = parallel_groups(random.chance() && world()->size() % 2 == 0 ? 2 : 0);
    const int64_t ranks = groups.expert_parallel->size();
    const auto alone = make_parallel_groups(make_self_communicator());
    Trained whole(options, alone, false);
    std::map<std::string, std::vector<int64_t>> shapes;
    for (const auto& parameter : whole.parameters) {
      shapes[parameter.name] = parameter.tensor.sizes().vec();
    }
    Trained saved(placed(options, random, ranks), groups, random.chance());
    auto other = options;
    other.seed = ~options.seed;
    Trained loaded(placed(other, random, ranks), groups, random.chance());
    SCOPED_TRACE(
        c10::str(saved.layer->options().placement, " to ", loaded.layer->options().placement));
    const SharedDirectory directory;
    whole.step(options.seed + 1, shapes);
    saved.step(options.seed + 1, shapes);
    save_checkpoint(directory.path(), *saved.layer, *saved.optimizer, {}, groups);
    load_checkpoint(directory.path(), *loaded.layer, *loaded.optimizer, groups);
    whole.step(options.seed + 2, shapes);
    loaded.step(options.seed + 2, shapes);
    for (size_t p = 0; p < whole.parameters.size(); ++p) {
      const auto& parameter = loaded.parameters[p];
      const auto wanted = held_part(whole.parameters[p].tensor.detach(), parameter, loaded.layer);
      EXPECT_TRUE(identical(parameter.tensor.detach(), wanted)) << parameter.name;
    }
  }
}

TEST(PlacedLayer, HasTheNormOfAllItsExperts) {
  Random random(test_seed());
  const auto options = options_of(random);
  MoELayer layer(placed(options, random, world()->size()), world());
  const auto whole = MoELayer(options)->named_parameters();
  double squares = 0;
  for (const auto& item : whole) squares += item.value().detach().square().sum().item<double>();
  for (auto& parameter : layer->parameters()) parameter.mutable_grad() = parameter.detach().clone();
  EXPECT_NEAR(gradient_norm(*layer, parallel_groups()), std::sqrt(squares),
              1e-5 * std::sqrt(squares));
}

TEST(PlacedLayer, LeavesFewChoicesToOtherNodes) {
  Random random(test_seed());
  for (const double limit : {0.0, 1e-9, 0.25}) {
    auto options = options_of(random);
    options.num_experts = 2 * world()->size();
    options.top_k = 2;
    options.renormalize = true;
    options.cross_node_limit = limit;
    MoELayer layer(options, world());
    const int64_t tokens = world()->rank() == 1 ? 0 : 40;
    const auto x = on_device(random.normal({tokens, options.hidden_size}, torch::kFloat32));
    const auto first = 2 * world()->rank();
    const auto experts = torch::arange(options.num_experts);
    RoutingConditions conditions;  // as if every rank were a node
    conditions.near_experts = on_device((experts >= first).logical_and(experts < first + 2));
    const auto out = layer->forward(x, conditions);
    const auto ids = out.expert_ids.cpu();
    const auto far = (ids < first).logical_or(ids >= first + 2).sum().item<int64_t>();
    if (limit > 0) {
      EXPECT_LE(static_cast<double>(far), limit * static_cast<double>(2 * tokens));
    } else {
      EXPECT_EQ(far > 0, tokens > 0 && world()->size() > 1);
    }
    Routing routing;
    routing.expert_ids = out.expert_ids;
    routing.weights = out.expert_weights.detach();
    EXPECT_TRUE(identical(layer->forward(x, routing).output, out.output));
    const auto free = layer->forward(x);  // all ranks of this test are on one node
    layer->eval();
    EXPECT_TRUE(free.expert_ids.equal(layer->forward(x).expert_ids));
  }
}

TEST(PlacedLayer, RefusesCrossNodeLimits) {
  Random random(test_seed());
  auto options = options_of(random);
  for (const double limit : {-0.1, 1.1, std::nan("")}) {
    options.cross_node_limit = limit;
    EXPECT_INPUT_ERROR(MoELayer(options, world()), "cross_node_limit");
  }
  options.cross_node_limit = 0.5;
  options.forced_routing = ForcedRouting::kRandom;
  EXPECT_INPUT_ERROR(MoELayer(options, world()), "cross_node_limit takes gate top_k");
}

TEST(PlacedLayer, InSlicesIsNotForMuon) {
  ANABRANCH_NEEDS_RANKS(2);
  Random random(test_seed());
  auto options = options_of(random);
  options.num_experts = 1;
  options.placement = "sliced";
  MoELayer layer(options, world());
  for (const auto& parameter : parallel_parameters(*layer, parallel_groups())) {
    if (parameter.name != "experts.down_weight") continue;
    EXPECT_INPUT_ERROR(make_muon({{parameter}}, {}, {}), "lies in slices");
  }
}

}  // namespace
}  // namespace anabranch::test
