#include <anabranch/checkpoint.h>
#include <anabranch/moe_layer.h>
#include <gtest/gtest.h>
#include <torch/optim/adam.h>
#include <torch/optim/rmsprop.h>
#include <torch/optim/sgd.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "checkpoint/checkpoint_case.h"
#include "checkpoint/index.h"
#include "support/devices.h"
#include "support/shared_directory.h"
#include "support/thrown.h"
#include "support/tolerance.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

namespace fs = std::filesystem;
using Options = ShardedModel::Options;

constexpr uint64_t kSeed = 10;
constexpr uint64_t kOtherSeed = 20;
constexpr uint64_t kGradientSeed = 30;

/// What the whole model is after that many steps.
Training expected_training(const Options& options, int steps, bool amsgrad = false) {
  auto whole = make_training(options, *make_self_communicator(), kSeed, amsgrad);
  train(whole, kGradientSeed, steps);
  return whole;
}

void save_after(const fs::path& directory, const Options& options, int steps,
                int64_t expert_parallel_size, bool amsgrad = false) {
  const auto groups = parallel_groups(expert_parallel_size);
  auto training = make_training(options, *groups.expert_parallel, kSeed, amsgrad);
  train(training, kGradientSeed, steps);
  save_checkpoint(directory, *training.model, training.optimizer.get(),
                  {{"step", std::to_string(steps)}}, groups);
}

/// Loads into a model of other numbers, with an optimizer that has been used.
Training load_into_other(const fs::path& directory, const Options& options,
                         const ParallelGroups& groups, bool amsgrad = false) {
  auto training = make_training(options, *groups.expert_parallel, kOtherSeed, amsgrad);
  train(training, kOtherSeed, 3);
  load_checkpoint(directory, *training.model, training.optimizer.get(), groups);
  return training;
}

std::vector<int64_t> divisors(int64_t ranks) {
  std::vector<int64_t> found;
  for (int64_t size = 1; size <= ranks; ++size) {
    if (ranks % size == 0) found.push_back(size);
  }
  return found;
}

/// Saved on all ranks; loaded by the first `size` of them and, apart from them, by the others.
void expect_loads_at_every_size(const fs::path& directory, const Options& options,
                                const Training& expected) {
  for (int size = 1; size <= world()->size(); ++size) {
    const auto part = world()->split(world()->rank() < size ? 0 : 1, world()->rank());
    for (const int64_t expert_parallel_size : divisors(part->size())) {
      SCOPED_TRACE(
          c10::str("loaded on ", part->size(), " ranks in groups of ", expert_parallel_size));
      const auto groups = make_parallel_groups(part, expert_parallel_size);
      expect_part_of(load_into_other(directory, options, groups), expected);
    }
  }
}

TEST(Checkpoint, LoadsAtAnyNumberOfRanks) {
  // NCCL takes about a second to tie a group, of which there are dozens.
  for (const int64_t num_experts :
       device().is_cuda() ? std::vector<int64_t>{5} : std::vector<int64_t>{1, 2, 5, 8}) {
    const Options options{.num_experts = num_experts};
    const auto expected = expected_training(options, 2);
    for (const int64_t expert_parallel_size : divisors(world()->size())) {
      SCOPED_TRACE(c10::str(num_experts, " experts, saved on ", world()->size(),
                            " ranks in groups of ", expert_parallel_size));
      const SharedDirectory directory;
      save_after(directory.path(), options, 2, expert_parallel_size);
      expect_loads_at_every_size(directory.path(), options, expected);
    }
  }
}

// A layer's numbers come from its seed, at any number of ranks: what is loaded must be those.
TEST(Checkpoint, OfALayerLoadsAtAnyNumberOfRanks) {
  MoEOptions options;
  options.hidden_size = 6;
  options.expert_hidden_size = 4;
  options.shared_expert_hidden_size = 3;
  options.num_experts = 5;
  options.device = device();
  options.glu = options.bias = options.expert_bias = options.shared_expert_gate = true;
  const auto expected = MoELayer(options)->named_parameters();
  const auto load = torch::tensor({3, 0, 1, 1, 0});
  const SharedDirectory directory;
  const auto groups = parallel_groups();
  MoELayer saved(options, groups.expert_parallel);
  saved->update_expert_bias(load, 0.5);
  save_checkpoint(directory.path(), *saved, nullptr, {}, groups);
  options.seed = 1;
  for (int size = 1; size <= world()->size(); ++size) {
    const auto part = world()->split(world()->rank() < size ? 0 : 1, world()->rank());
    const auto part_groups = make_parallel_groups(part);
    MoELayer layer(options, part_groups.expert_parallel);
    load_checkpoint(directory.path(), *layer, nullptr, part_groups);
    for (const auto& parameter : parallel_parameters(*layer)) {
      auto wanted = expected[parameter.name];
      if (parameter.is_expert) {
        wanted = wanted.narrow(0, parameter.first_place, parameter.tensor.size(0));
      }
      EXPECT_TRUE(identical(parameter.tensor, wanted)) << parameter.name;
    }
    EXPECT_TRUE(identical(layer->named_buffers()["router.expert_bias"],
                          torch::tensor({-0.5F, 0.5F, 0.0F, 0.0F, 0.5F})));
  }
}

TEST(Checkpoint, HoldsEveryType) {
  for (const auto dtype : {torch::kFloat64, torch::kFloat16, torch::kBFloat16}) {
    const Options options{.dtype = dtype};
    const SharedDirectory directory;
    const auto groups = parallel_groups();
    save_after(directory.path(), options, 1, 0);
    expect_part_of(load_into_other(directory.path(), options, groups),
                   expected_training(options, 1));
  }
}

TEST(Checkpoint, TrainingGoesOnAsIfNothingHadHappened) {
  for (const bool amsgrad : {false, true}) {
    const SharedDirectory directory;
    const auto groups = parallel_groups();
    save_after(directory.path(), {}, 3, 0, amsgrad);
    auto training = load_into_other(directory.path(), {}, groups, amsgrad);
    train(training, kGradientSeed + 3, 4);
    expect_part_of(training, expected_training({}, 7, amsgrad));
  }
}

TEST(Checkpoint, StateOfAnUnusedOptimizerIsNone) {
  const SharedDirectory directory;
  const auto groups = parallel_groups();
  save_after(directory.path(), {}, 0, 0);
  const auto training = load_into_other(directory.path(), {}, groups);
  EXPECT_TRUE(training.optimizer->state().empty());
}

TEST(Checkpoint, KeepsMetadata) {
  const SharedDirectory directory;
  const auto groups = parallel_groups();
  const auto model = make_sharded_model({}, *groups.expert_parallel, kSeed);
  const CheckpointMetadata metadata{{"step", "12"}, {"", "\"\\\n"}, {"Überschrift", ""}};
  // Rank 0's word counts.
  save_checkpoint(directory.path(), *model, nullptr,
                  world()->rank() == 0 ? metadata : CheckpointMetadata{}, groups);
  EXPECT_EQ(load_checkpoint(directory.path(), *model, nullptr, groups), metadata);
}

TEST(Checkpoint, NamesExpertsByTheirGlobalNumber) {
  const SharedDirectory directory;
  save_after(directory.path(), {.num_experts = 3}, 1, 0);
  std::ifstream file(directory.path() / "checkpoint.index.json");
  const auto index = nlohmann::json::parse(file);
  EXPECT_EQ(index.at("metadata").at("step"), "1");
  const auto& names = index.at("weight_map");
  for (const char* name :
       {"gate", "table", "block.mask", "block.bias", "frozen", "experts.0.up_weight",
        "experts.2.down_bias", "block.experts.0.up_weight", "shared_expert.up_weight",
        "optimizer.step.gate", "optimizer.exp_avg.gate", "optimizer.step.experts.up_weight",
        "optimizer.exp_avg_sq.experts.2.up_weight"}) {
    EXPECT_TRUE(names.contains(name)) << name;
  }
  for (const char* name : {"experts.3.up_weight", "block.tied", "optimizer.exp_avg.frozen"}) {
    EXPECT_FALSE(names.contains(name)) << name;
  }
}

TEST(Checkpoint, EveryRankWritesItsExpertsAndNoOthers) {
  const SharedDirectory directory;
  save_after(directory.path(), {.num_experts = 8}, 1, 0);
  std::ifstream file(directory.path() / "checkpoint.index.json");
  const auto index = nlohmann::json::parse(file);
  const ExpertPlacement placement{8, world()->size()};
  for (int rank = 0; rank < world()->size(); ++rank) {
    const auto first = placement.first_place(rank);
    for (int64_t e = first; e < first + placement.local_experts(rank); ++e) {
      const std::string name = index["weight_map"][c10::str("experts.", e, ".up_weight")];
      EXPECT_NE(name.find(c10::str("rank0000", rank, "-of")), std::string::npos) << name;
    }
  }
}

TEST(Checkpoint, ReplacesTheFormerOneAndItsFiles) {
  const SharedDirectory shared;
  const auto directory = shared.path() / "made" / "by saving";
  const auto groups = parallel_groups();
  save_after(directory, {}, 1, 0);
  const auto before = files_in(directory);
  if (world()->rank() == 0) std::ofstream(directory / "model-notes.txt") << "not ours to remove";
  save_after(directory, {}, 2, 0);
  const auto after = files_in(directory);
  EXPECT_EQ(after.size(), before.size() + 1);
  for (const auto& name : before) EXPECT_EQ(after.contains(name), name == kIndexName) << name;
  EXPECT_TRUE(after.contains("model-notes.txt"));
  expect_part_of(load_into_other(directory, {}, groups), expected_training({}, 2));
}

TEST(Checkpoint, LoadsAModelWithoutItsOptimizer) {
  const SharedDirectory directory;
  const auto groups = parallel_groups();
  save_after(directory.path(), {}, 1, 0);
  auto training = make_training({}, *groups.expert_parallel, kOtherSeed);
  load_checkpoint(directory.path(), *training.model, nullptr, groups);
  EXPECT_TRUE(training.optimizer->state().empty());
  const auto expected = expected_training({}, 1).model->named_parameters();
  for (const auto& item : training.model->named_parameters()) {
    EXPECT_TRUE(identical(item.value(), training.model->part(item.key(), expected[item.key()])));
  }
}

/// parameters() lists the tied one twice.
std::vector<torch::Tensor> each_once(const ShardedModel& model) {
  std::vector<torch::Tensor> tensors;
  for (const auto& parameter : parallel_parameters(model)) tensors.push_back(parameter.tensor);
  return tensors;
}

/// Two steps, a save and a load, two more: the same as four.
template <typename Optimizer, typename OptimizerOptions>
void expect_resumes(const OptimizerOptions& options) {
  const SharedDirectory directory;
  const auto groups = parallel_groups();
  const auto straight = make_sharded_model({}, *groups.expert_parallel, kSeed);
  const auto resumed = make_sharded_model({}, *groups.expert_parallel, kOtherSeed);
  const auto step = [](ShardedModel& model, torch::optim::Optimizer& optimizer, uint64_t seed) {
    model.set_gradients(seed);
    optimizer.step();
  };
  Optimizer optimizer(each_once(*straight), options);
  Optimizer other(each_once(*resumed), options);
  for (const uint64_t seed : {1, 2}) step(*straight, optimizer, seed);
  save_checkpoint(directory.path(), *straight, &optimizer, {}, groups);
  load_checkpoint(directory.path(), *resumed, &other, groups);
  for (const uint64_t seed : {3, 4}) {
    step(*straight, optimizer, seed);
    step(*resumed, other, seed);
  }
  const auto expected = straight->parameters();
  const auto actual = resumed->parameters();
  for (size_t i = 0; i < expected.size(); ++i) EXPECT_TRUE(identical(actual[i], expected[i]));
}

TEST(Checkpoint, ResumesEveryOptimizer) {
  using namespace torch::optim;
  expect_resumes<AdamW>(torch::optim::AdamWOptions(0.01));
  expect_resumes<AdamW>(torch::optim::AdamWOptions(0.01).amsgrad(true));
  expect_resumes<Adam>(AdamOptions(0.01).weight_decay(0.1));
  expect_resumes<SGD>(SGDOptions(0.1).momentum(0.9));
  expect_resumes<SGD>(SGDOptions(0.1));
}

TEST(Checkpoint, RefusesAnotherOptimizer) {
  const SharedDirectory directory;
  const auto groups = parallel_groups();
  auto training = make_training({}, *groups.expert_parallel, kSeed);
  train(training, kGradientSeed, 1);
  auto& model = *training.model;
  torch::optim::SGD sgd(each_once(model), 0.1);
  torch::optim::RMSprop rmsprop(each_once(model));

  expect_checkpoint_error([&] { save_checkpoint(directory.path(), model, &rmsprop, {}, groups); },
                          "RMSprop");
  EXPECT_TRUE(files_in(directory.path()).empty());
  save_checkpoint(directory.path(), model, nullptr, {}, groups);
  expect_checkpoint_error(
      [&] { load_checkpoint(directory.path(), model, training.optimizer.get(), groups); },
      "holds no optimizer");
  save_checkpoint(directory.path(), model, training.optimizer.get(), {}, groups);
  expect_checkpoint_error([&] { load_checkpoint(directory.path(), model, &sgd, groups); },
                          "holds AdamW");
  expect_checkpoint_error([&] { load_checkpoint(directory.path(), model, &rmsprop, groups); },
                          "RMSprop");

  auto other = make_training({}, *groups.expert_parallel, kOtherSeed, /*amsgrad=*/true);
  const Snapshot snapshot(other);
  expect_checkpoint_error(
      [&] { load_checkpoint(directory.path(), *other.model, other.optimizer.get(), groups); },
      "no 'optimizer.max_exp_avg_sq.");
  snapshot.expect_unchanged();
}

TEST(Checkpoint, RefusesAnOptimizerWithATensorTwice) {
  const SharedDirectory directory;
  const auto groups = parallel_groups();
  const auto model = make_sharded_model({}, *groups.expert_parallel, kSeed);
  torch::optim::Adam optimizer(model->parameters());  // with the tied one under both names
  expect_checkpoint_error(
      [&] { save_checkpoint(directory.path(), *model, &optimizer, {}, groups); },
      "the optimizer updates 'gate' twice");
}

TEST(Checkpoint, RefusesAnOptimizerOfAnotherModel) {
  const SharedDirectory directory;
  const auto groups = parallel_groups();
  const auto training = make_training({}, *groups.expert_parallel, kSeed);
  const auto other = make_training({}, *groups.expert_parallel, kSeed);
  expect_checkpoint_error(
      [&] {
        save_checkpoint(directory.path(), *training.model, other.optimizer.get(), {}, groups);
      },
      "no parameter of the model");
}

struct Misfit {
  Options options;
  std::string message;
};

TEST(Checkpoint, RefusesAModelThatDoesNotFit) {
  const SharedDirectory directory;
  const auto groups = parallel_groups();
  save_after(directory.path(), {.num_experts = 5}, 1, 0);
  for (const auto& [options, message] : {
           Misfit{{.num_experts = 4}, "has 5 experts of 'experts.up_weight', the model has 4"},
           Misfit{{.num_experts = 6}, "has 5 experts of 'experts.up_weight', the model has 6"},
           Misfit{{.hidden_size = 7}, "is stored with shape [5, 6], the model's is [5, 7]"},
           Misfit{{.dtype = torch::kFloat64}, "is stored as F32, the model's is F64"},
           Misfit{{.dtype = torch::kBFloat16}, "is stored as F32, the model's is BF16"},
       }) {
    auto training = make_training(options, *groups.expert_parallel, kOtherSeed);
    train(training, kOtherSeed, 1);
    const Snapshot snapshot(training);
    expect_checkpoint_error(
        [&] {
          load_checkpoint(directory.path(), *training.model, training.optimizer.get(), groups);
        },
        message);
    snapshot.expect_unchanged();
  }
}

TEST(Checkpoint, RefusesNamesThatDoNotFit) {
  const SharedDirectory directory;
  const auto groups = parallel_groups();
  torch::nn::Module model;
  auto first = model.register_parameter("first", torch::ones({2}));
  save_checkpoint(directory.path(), model, nullptr, {}, groups);
  torch::nn::Module more;
  more.register_parameter("first", torch::zeros({2}));
  more.register_parameter("second", torch::zeros({2}));
  expect_checkpoint_error([&] { load_checkpoint(directory.path(), more, nullptr, groups); },
                          "has no 'second'");
  EXPECT_TRUE(identical(more.parameters()[0], torch::zeros({2})));
  torch::nn::Module none;
  expect_checkpoint_error([&] { load_checkpoint(directory.path(), none, nullptr, groups); },
                          "has 'first', the model has not");
  torch::nn::Module confusing;
  confusing.register_module("optimizer", std::make_shared<torch::nn::Module>())
      ->register_parameter("first", torch::zeros({2}));
  expect_checkpoint_error(
      [&] { save_checkpoint(directory.path(), confusing, nullptr, {}, groups); },
      "has a name of the optimizer");
}

TEST(Checkpoint, SaysWhenThereIsNone) {
  const SharedDirectory directory;
  const auto groups = parallel_groups();
  const auto model = make_sharded_model({}, *groups.expert_parallel, kSeed);
  expect_checkpoint_error(
      [&] { load_checkpoint(directory.path() / "nowhere", *model, nullptr, groups); },
      "No such file");
  expect_checkpoint_error([&] { load_checkpoint(directory.path(), *model, nullptr, groups); },
                          "checkpoint.index.json: No such file");
}

TEST(Checkpoint, OneRankThatCannotWriteStopsAll) {
  const SharedDirectory directory;
  const auto groups = parallel_groups();
  save_after(directory.path(), {}, 1, 0);
  const auto before = files_in(directory.path());
  auto training = make_training({}, *groups.expert_parallel, kOtherSeed);
  const int last = world()->size() - 1;
  const auto target =
      world()->rank() == last ? fs::path("/proc/no such directory") : directory.path();
  expect_checkpoint_error([&] { save_checkpoint(target, *training.model, nullptr, {}, groups); },
                          c10::str("rank ", last, ": "));
  EXPECT_EQ(files_in(directory.path()), before);
  expect_part_of(load_into_other(directory.path(), {}, groups), expected_training({}, 1));
}

TEST(Checkpoint, OneRankThatCannotReadStopsAll) {
  ANABRANCH_NEEDS_RANKS(2);
  const SharedDirectory directory;
  const auto groups = parallel_groups();
  save_after(directory.path(), {}, 1, 0);
  auto training = make_training({}, *groups.expert_parallel, kOtherSeed);
  const Snapshot snapshot(training);
  const auto source = world()->rank() == 1 ? directory.path() / "elsewhere" : directory.path();
  expect_checkpoint_error(
      [&] { load_checkpoint(source, *training.model, training.optimizer.get(), groups); },
      "rank 1: open ");
  snapshot.expect_unchanged();
}

TEST(Checkpoint, RanksMustSaveTheSameModel) {
  ANABRANCH_NEEDS_RANKS(2);
  const SharedDirectory directory;
  const auto groups = parallel_groups();
  auto training = make_training({}, *groups.expert_parallel, kSeed);
  train(training, kGradientSeed, world()->rank() == 1 ? 2 : 1);
  const auto thrown = thrown_by([&] {
    save_checkpoint(directory.path(), *training.model, training.optimizer.get(), {}, groups);
  });
  EXPECT_EQ(thrown.kind, Thrown::Kind::kCommunication) << thrown;
  EXPECT_TRUE(thrown.says("optimizer.step.gate")) << thrown;
  EXPECT_TRUE(files_in(directory.path()).empty());
}

}  // namespace
}  // namespace anabranch::test
