// Experts that move between steps: where to, and that training does not notice.
#include <anabranch/checkpoint.h>
#include <anabranch/expert_mover.h>
#include <gtest/gtest.h>

#include <numeric>

#include "placement/moves.h"
#include "support/devices.h"
#include "support/placements.h"
#include "support/shared_directory.h"
#include "support/thrown.h"
#include "support/tolerance.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

std::vector<int64_t> loads_of_ranks(const std::vector<int64_t>& loads,
                                    const ExpertPlacement& placement) {
  std::vector<int64_t> of_ranks;
  for (const auto& held : placement.held) {
    int64_t all = 0;
    for (const auto& each : held) all += loads[each.expert];
    of_ranks.push_back(all);
  }
  return of_ranks;
}

int64_t most(const std::vector<int64_t>& values) {
  return *std::max_element(values.begin(), values.end());
}

/// Whether a swap of two experts would leave the ranks' loads, the largest first, smaller.
bool some_swap_helps(const std::vector<int64_t>& loads, const ExpertPlacement& placement) {
  const auto sorted = [&](const ExpertPlacement& of) {
    auto all = loads_of_ranks(loads, of);
    std::sort(all.rbegin(), all.rend());
    return all;
  };
  for (size_t a = 0; a < placement.held.size(); ++a) {
    for (size_t b = a + 1; b < placement.held.size(); ++b) {
      for (size_t i = 0; i < placement.held[a].size(); ++i) {
        for (size_t j = 0; j < placement.held[b].size(); ++j) {
          auto other = placement;
          std::swap(other.held[a][i], other.held[b][j]);
          if (most(loads_of_ranks(loads, other)) < most(loads_of_ranks(loads, placement)) &&
              sorted(other) < sorted(placement)) {
            return true;
          }
        }
      }
    }
  }
  return false;
}

TEST(ExpertMoves, LeaveNoSwapThatTakesLoadOffTheFullestRank) {
  Random random(test_seed());
  for (int i = 0; i < 40; ++i) {
    const int64_t ranks = random.integer(1, 6);
    const auto from = ExpertPlacement::parse("movable", random.integer(1, 14), ranks);
    std::vector<int64_t> loads(from.num_experts);
    for (auto& load : loads) load = random.chance(0.2) ? 0 : random.integer(0, 1000);
    const auto choice = choose_moves(loads, from, std::vector<int>(ranks, 0), 0);
    SCOPED_TRACE(c10::str(from.describe(), " to ", choice.placement.describe()));
    EXPECT_NO_THROW(check_placement(choice.placement));
    for (int64_t rank = 0; rank < ranks; ++rank) {
      EXPECT_EQ(choice.placement.local_experts(rank), from.local_experts(rank));
    }
    const auto before = loads_of_ranks(loads, from);
    const auto after = loads_of_ranks(loads, choice.placement);
    const double mean = std::accumulate(loads.begin(), loads.end(), 0.0) / ranks;
    EXPECT_FALSE(some_swap_helps(loads, choice.placement));
    EXPECT_LE(most(after), most(before));
    if (mean > 0) {
      EXPECT_NEAR(choice.before, most(before) / mean, 1e-12);
      EXPECT_NEAR(choice.after, most(after) / mean, 1e-12);
    }
    EXPECT_EQ(choice.placement.held == from.held, most(after) == most(before));
  }
}

TEST(ExpertMoves, StayWithinANodeWhereThatIsEnoughAndWhereTheyGainTooLittle) {
  const auto from = ExpertPlacement::parse("movable", 8, 4);
  // Two hot experts on rank 0; rank 1, of its node, is as idle as rank 2.
  const std::vector<int64_t> hot = {90, 90, 10, 10, 10, 10, 50, 50};
  EXPECT_EQ(choose_moves(hot, from, {0, 0, 1, 1}, 0.05).placement.describe(), "2,1;0,3;4,5;6,7");
  const auto across = choose_moves(hot, from, {0, 1, 0, 1}, 0.05).placement.describe();
  EXPECT_EQ(across, "4,1;2,3;0,5;6,7");
  // A node that is all hot.
  const std::vector<int64_t> node = {50, 50, 50, 50, 0, 0, 0, 0};
  EXPECT_EQ(choose_moves(node, from, {0, 0, 1, 1}, 0.05).after, 1);
  const std::vector<int64_t> little = {12, 12, 10, 10, 10, 10, 10, 10};
  EXPECT_EQ(choose_moves(little, from, {0, 0, 0, 0}, 0.1).placement.held, from.held);
  EXPECT_NE(choose_moves(little, from, {0, 0, 0, 0}, 0.05).placement.held, from.held);
}

MoEOptions movable_options(Random& random, torch::Dtype dtype, int64_t top_k) {
  MoEOptions options;
  // Rows and weights begin on 64 bytes wherever they lie, by which a CPU's products may round.
  options.hidden_size = options.expert_hidden_size = 32;
  options.num_experts = 7;
  options.top_k = top_k;
  options.renormalize = top_k > 1;
  options.glu = options.bias = true;
  options.shared_expert_hidden_size = 3;
  options.engine = "deterministic";
  options.dtype = dtype;
  options.device = device();
  options.seed = random.next();
  options.placement = "movable";
  return options;
}

/// Two layers in turn, and what trains them.
struct Training {
  Training(const MoEOptions& options, const ParallelGroups& groups, bool sharded, bool muon)
      : groups(groups) {
    for (const char* name : {"first", "second"}) {
      layers.emplace_back(options, groups.expert_parallel);
      model.register_module(name, layers.back());
    }
    parameters = trained_parameters(model, groups);
    const OptimizerMaker make = [&](const std::vector<ParallelParameter>& of) {
      std::vector<MuonParameter> matrices;
      std::vector<ParallelParameter> others;
      for (const auto& each : of) {
        const bool is_matrix = muon && each.tensor.dim() == 3;
        if (is_matrix) matrices.push_back({each});
        if (!is_matrix) others.push_back(each);
      }
      AdamWOptions adamw;
      adamw.state = torch::kBFloat16;  // rounded by noise
      return muon ? make_muon(matrices, others, {.adamw = adamw}) : make_adamw(others, adamw);
    };
    optimizer = sharded ? make_sharded_optimizer(parameters, groups, make) : make(parameters);
  }

  /// Of this rank's tokens; what the layers' experts had to do, over all ranks.
  torch::Tensor step(const torch::Tensor& x, const torch::Tensor& dy) {
    auto y = x;
    std::vector<torch::Tensor> loads;
    for (auto& layer : layers) {
      const auto out = layer->forward(y);
      y = y + out.output;
      loads.push_back(out.expert_load);
    }
    y.backward(dy);
    accumulate_gradients(parameters);
    finish_gradients(gradients_of(parameters), *groups.world, *groups.expert_replicas);
    optimizer->step(0.05, torch::ones({}, torch::dtype(torch::kFloat64).device(device())));
    zero_gradients(parameters);
    auto load = torch::stack(loads);
    groups.expert_replicas->all_reduce(load);
    return load;
  }

  const ParallelGroups& groups;
  torch::nn::Module model;
  std::vector<MoELayer> layers;
  std::vector<ParallelParameter> parameters;
  std::unique_ptr<ParallelOptimizer> optimizer;
};

/// All that a model and its optimizer have, experts by their numbers: [E, ..].
std::map<std::string, torch::Tensor> whole_state(const Training& training) {
  auto tensors = parallel_parameters(training.model);
  for (const auto& tensor : training.optimizer->state()) tensors.push_back(tensor);
  std::map<std::string, torch::Tensor> state;
  for (const auto& tensor : tensors) {
    if (tensor.tensor.is_meta()) continue;
    auto values = tensor.tensor.detach().to(torch::kCPU, torch::kFloat64);
    if (tensor.is_expert) {
      auto sizes = tensor.tensor.sizes().vec();
      sizes[0] = tensor.num_experts;
      auto whole = torch::zeros(sizes, torch::kFloat64);
      for (int64_t local = 0; local < values.size(0); ++local) {
        whole[tensor.held(local).expert] = values[local];
      }
      // What every group holds is as often there as there are groups.
      world()->all_reduce(whole);
      values = tensor.owner < 0 ? whole / training.groups.expert_replicas->size() : whole;
    }
    state[tensor.name] = values;
  }
  return state;
}

class ExpertMoverTest : public ::testing::Test {
 protected:
  /// `steps` steps with moves after each and without, from the same begin; how many experts moved.
  int64_t compare(const MoEOptions& options, const ParallelGroups& groups, bool sharded, bool muon,
                  double tolerance) {
    Training moving(options, groups, sharded, muon), staying(options, groups, sharded, muon);
    ExpertMover mover(moving.model, *moving.optimizer, groups, {.interval = 1, .least_gain = 0});
    for (int i = 0; i < 3; ++i) {
      const auto all = random_.normal({2, world()->size(), 12, options.hidden_size}, options.dtype);
      const auto x = on_device(all[0][world()->rank()].contiguous());
      const auto dy = on_device(all[1][world()->rank()].contiguous());
      const auto load = moving.step(x, dy);
      mover.after_step(load);
      const auto other = staying.step(x, dy);
      if (tolerance == 0) {
        EXPECT_TRUE(identical(load, other));
      }
    }
    const auto found = whole_state(moving);
    const auto expected = whole_state(staying);
    EXPECT_EQ(found.size(), expected.size());
    for (const auto& [name, tensor] : expected) {
      if (tolerance == 0) {
        EXPECT_TRUE(identical(found.at(name), tensor)) << name;
      } else {
        EXPECT_TRUE(close(found.at(name), tensor, tolerance * (1 + max_abs(tensor)))) << name;
      }
    }
    expect_same_from_checkpoint(moving, options, sharded, muon);
    EXPECT_EQ(mover.moves().experts > 0, mover.moves().seconds > 0);
    EXPECT_EQ(mover.moves().experts > 0, mover.moves().bytes > 0);
    return mover.moves().experts;
  }

  /// What has moved is kept by its experts' numbers, and comes back in blocks.
  void expect_same_from_checkpoint(Training& moved, MoEOptions options, bool sharded, bool muon) {
    const SharedDirectory directory;
    save_checkpoint(directory.path(), moved.model, *moved.optimizer, {}, moved.groups);
    options.placement = "blocks";
    options.seed = ~options.seed;
    Training loaded(options, moved.groups, sharded, muon);
    load_checkpoint(directory.path(), loaded.model, *loaded.optimizer, moved.groups);
    const auto expected = whole_state(moved);
    for (const auto& [name, tensor] : whole_state(loaded)) {
      EXPECT_TRUE(identical(tensor, expected.at(name))) << name;
    }
  }

  const ParallelGroups& groups() {
    return parallel_groups(world()->size() % 2 == 0 && random_.chance() ? 2 : 0);
  }
  Random random_{test_seed()};
};

// With one expert a token nothing is added in another order, wherever experts lie.
TEST_F(ExpertMoverTest, TrainingWithOneExpertATokenHasTheSameBits) {
  int64_t moved = 0;
  for (const auto dtype : {torch::kFloat32, torch::kBFloat16}) {
    for (const bool sharded : {false, true}) {
      const bool muon = random_.chance();
      SCOPED_TRACE(c10::str(dtype, sharded ? " sharded" : "", muon ? " Muon" : ""));
      moved += compare(movable_options(random_, dtype, 1), groups(), sharded, muon, 0);
    }
  }
  EXPECT_EQ(moved > 0, world()->size() > 1);
}

// With several, a token's results are summed by rank: other ranks, other roundings.
TEST_F(ExpertMoverTest, TrainingIsTheSameWithinRounding) {
  // AdamW divides rounding errors, of a thousand additions, by as little as its epsilon of 1e-8; three steps of 0.05.
  const double tolerance = 3 * 0.05 * 1000 * unit_roundoff(torch::kFloat64) / 1e-8;
  compare(movable_options(random_, torch::kFloat64, 3), groups(), false, false, tolerance);
  auto options = movable_options(random_, torch::kFloat64, 2);
  options.balance = "shadow";
  compare(options, groups(), true, false, tolerance);
}

TEST_F(ExpertMoverTest, RefusesWhatCannotMove) {
  auto options = movable_options(random_, torch::kFloat32, 1);
  for (const char* placement : {"blocks", "sliced"}) {
    options.placement = placement;
    options.num_experts = 1;
    if (world()->size() == 1 && options.placement == "sliced") continue;  // blocks
    Training training(options, parallel_groups(), false, false);
    const auto make = [&] {
      ExpertMover(training.model, *training.optimizer, training.groups, {});
    };
    EXPECT_INPUT_ERROR(make(), "expected movable or lists of whole experts");
  }
  Training training(movable_options(random_, torch::kFloat32, 1), parallel_groups(), false, false);
  const auto make = [&](ExpertMoverOptions given) {
    return ExpertMover(training.model, *training.optimizer, training.groups, given);
  };
  EXPECT_INPUT_ERROR(make({.interval = 0}), "expected at least 1");
  EXPECT_INPUT_ERROR(make({.least_gain = 1}), "least_gain < 1");
  auto mover = make({});
  EXPECT_INPUT_ERROR(mover.after_step(torch::zeros({7}, torch::kLong)),
                     "expected Long [2, experts]");
  EXPECT_INPUT_ERROR(training.layers[0]->place({8, world()->size()}), "whole experts on each rank");
}

}  // namespace
}  // namespace anabranch::test
