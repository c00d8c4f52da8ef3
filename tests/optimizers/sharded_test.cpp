// Optimizers whose states lie over the ranks: the bits of those whose do not.
#include <anabranch/checkpoint.h>
#include <gtest/gtest.h>

#include <limits>

#include "optimizers/optimizer_case.h"
#include "support/shared_directory.h"
#include "support/tolerance.h"

namespace anabranch::test {
namespace {

struct Way {
  const char* name;
  OptimizerMaker make;
  /// Of one update, beside a number of about 1: not 0 where a batch of fewer matrices is multiplied otherwise.
  double rounding = 0;
};

std::unique_ptr<ParallelOptimizer> default_muon(const std::vector<ParallelParameter>& parameters) {
  std::vector<MuonParameter> matrices;
  std::vector<ParallelParameter> others;
  for (const auto& parameter : parameters) {
    if (parameter.tensor.dim() == (parameter.is_expert ? 3 : 2)) {
      matrices.push_back({parameter});
    } else {
      others.push_back(parameter);
    }
  }
  return make_muon(matrices, others, {});
}

/// Five iterations of three products in bf16, to values of 0.2 in the mean.
double muon_rounding() { return kRate * tolerance_of_stages(torch::kBFloat16, 0, 0.2, 5 * 3); }

std::vector<Way> ways() {
  const auto adamw = [](torch::Dtype state) {
    return [state](const std::vector<ParallelParameter>& parameters) {
      return make_adamw(parameters, {.state = state, .seed = test_seed()});
    };
  };
  return {{"AdamW", adamw(torch::kFloat32)},
          {"AdamW with bf16 states", adamw(torch::kBFloat16)},
          {"Muon", default_muon, device().is_cuda() ? muon_rounding() : 0}};
}

/// A model in training, its optimizer sharded or not.
struct InTraining : OptimizerCase {
  InTraining(const ShardedModel::Options& options, const ParallelGroups& groups,
             const OptimizerMaker& make, bool sharded)
      : OptimizerCase(options, *groups.expert_parallel, groups),
        optimizer(sharded ? make_sharded_optimizer(parameters, groups, make) : make(parameters)) {}

  /// The second step's gradient is not finite.
  void take_steps(int64_t first, int64_t last) {
    for (int64_t step = first; step <= last; ++step) {
      set_gradients(step);
      optimizer->step(kRate, scale_of(step == 2 ? std::numeric_limits<double>::quiet_NaN() : 0.5));
      zero_gradients(parameters);
    }
  }

  std::unique_ptr<ParallelOptimizer> optimizer;
};

/// Of the whole model on one rank.
int64_t elements_of_whole_state(const ShardedModel::Options& options, const OptimizerMaker& make) {
  const auto groups = make_parallel_groups(make_self_communicator());
  const OptimizerCase whole(options, *groups.expert_parallel, groups);
  int64_t elements = 0;
  for (const auto& state : make(whole.parameters)->state()) {
    elements += state.tensor.dim() > 0 ? state.tensor.numel() : 0;
  }
  return elements;
}

/// What this rank has of `found` is that of `expected`, which has all of its experts, or `allowed` away from it, and
/// rounded to its type.
void expect_part_of(const ParallelParameter& found, const ParallelParameter& expected,
                    double allowed) {
  if (found.tensor.is_meta()) return;
  const int64_t first = found.first_place - expected.first_place;
  const auto part =
      found.is_expert ? expected.tensor.narrow(0, first, found.tensor.size(0)) : expected.tensor;
  if (allowed == 0 || !found.tensor.is_floating_point()) {
    EXPECT_TRUE(identical(found.tensor.detach(), part.detach())) << found.name;
    return;
  }
  EXPECT_EQ(found.tensor.scalar_type(), part.scalar_type()) << found.name;
  const double roundings = 2 * unit_roundoff(found.tensor.scalar_type()) * max_abs(part.detach());
  EXPECT_TRUE(close(found.tensor.detach(), part.detach(), allowed + roundings)) << found.name;
}

void expect_same(const InTraining& found, const InTraining& expected, double allowed) {
  for (size_t i = 0; i < found.parameters.size(); ++i) {
    expect_part_of(found.parameters[i], expected.parameters[i], allowed);
  }
  std::map<std::string, ParallelParameter> states;
  for (const auto& state : expected.optimizer->state()) states.emplace(state.name, state);
  const auto parts = found.optimizer->state();
  EXPECT_EQ(parts.size(), states.size());
  for (const auto& part : parts) expect_part_of(part, states.at(part.name), allowed);
}

/// Elements of the state on all ranks together, but for the counts of steps.
int64_t elements_of_state(const ParallelOptimizer& optimizer) {
  auto sum = torch::zeros({}, torch::dtype(torch::kInt64).device(device()));
  for (const auto& state : optimizer.state()) {
    if (state.tensor.dim() > 0 && !state.tensor.is_meta()) sum += state.tensor.numel();
  }
  world()->all_reduce(sum);
  return sum.item<int64_t>();
}

TEST(ShardedOptimizer, HasTheBitsOfOneThatIsNotAndItsStateOnce) {
  for (const auto dtype : {torch::kFloat32, torch::kBFloat16}) {
    const ShardedModel::Options options{.num_experts = 5, .dtype = dtype};
    for (const auto& [name, make, rounding] : ways()) {
      for (const int size : expert_parallel_sizes()) {
        SCOPED_TRACE(c10::str(name, " ", dtype, ", expert-parallel size ", size));
        const auto& groups = parallel_groups(size);
        InTraining sharded(options, groups, make, true);
        InTraining whole(options, groups, make, false);
        sharded.take_steps(1, 3);
        whole.take_steps(1, 3);
        expect_same(sharded, whole, 3 * rounding);
        EXPECT_EQ(elements_of_state(*sharded.optimizer), elements_of_whole_state(options, make));
      }
    }
  }
}

TEST(ShardedOptimizer, GoesOnFromACheckpointOfAnyLayout) {
  const ShardedModel::Options options{.num_experts = 5, .dtype = torch::kBFloat16};
  for (const auto& [name, make, rounding] : ways()) {
    for (const int size : expert_parallel_sizes()) {
      for (const bool sharded : {true, false}) {
        SCOPED_TRACE(c10::str(name, sharded ? ", saved sharded" : ", loaded sharded",
                              ", expert-parallel size ", size));
        const SharedDirectory directory;
        const auto& groups = parallel_groups(size);
        InTraining saved(options, groups, make, sharded);
        saved.take_steps(1, 3);
        save_checkpoint(directory.path(), *saved.model, *saved.optimizer, {}, groups);

        const auto& all = parallel_groups();
        InTraining loaded(options, all, make, !sharded);
        loaded.model->fill(test_seed() + 1);
        load_checkpoint(directory.path(), *loaded.model, *loaded.optimizer, all);
        loaded.take_steps(4, 5);
        InTraining straight(options, all, make, false);
        straight.take_steps(1, 5);
        expect_same(loaded, straight, 5 * rounding);
      }
    }
  }
}

}  // namespace
}  // namespace anabranch::test
