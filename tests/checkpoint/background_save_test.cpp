// Checkpoints that a thread writes: of the moment they were begun at, whole or not at all.
#include <gtest/gtest.h>

#include <chrono>
#include <thread>

#include "checkpoint/checkpoint_case.h"
#include "optimizers/optimizer_case.h"
#include "support/file_size_limit.h"
#include "support/shared_directory.h"
#include "support/tolerance.h"

namespace anabranch::test {
namespace {

/// A model in training on this rank.
struct InTraining : OptimizerCase {
  explicit InTraining(const ParallelGroups& groups)
      : OptimizerCase({.num_experts = 5, .dtype = torch::kBFloat16}, *groups.expert_parallel,
                      groups),
        optimizer(make_adamw(parameters, {})) {}

  void take_step() {
    set_gradients(++step);
    optimizer->step(0.01, scale_of(1));
    zero_gradients(parameters);
  }

  std::map<std::string, torch::Tensor> numbers() const {
    std::map<std::string, torch::Tensor> copies;
    for (const auto& [name, tensor] : named(optimizer->state()))
      copies.emplace(name, tensor.clone());
    for (const auto& parameter : parameters) {
      copies.emplace(parameter.name, parameter.tensor.detach().clone());
    }
    return copies;
  }

  std::unique_ptr<ParallelOptimizer> optimizer;
  int64_t step = 0;
};

void expect_loads(const std::filesystem::path& directory, const ParallelGroups& groups,
                  const std::map<std::string, torch::Tensor>& expected) {
  InTraining other(groups);
  other.model->fill(test_seed() + 1);
  load_checkpoint(directory, *other.model, *other.optimizer, groups);
  for (const auto& [name, tensor] : other.numbers()) {
    EXPECT_TRUE(identical(tensor, expected.at(name))) << name;
  }
}

TEST(BackgroundSave, HasWhatWasThereWhenItBegan) {
  for (const int size : expert_parallel_sizes()) {
    const SharedDirectory directory;
    const auto& groups = parallel_groups(size);
    InTraining training(groups);
    training.take_step();
    BackgroundSave save(directory.path(), *training.model, *training.optimizer, {{"step", "1"}},
                        groups);
    const auto expected = training.numbers();
    training.take_step();
    while (!save.is_written()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    EXPECT_EQ(files_in(directory.path()).count("checkpoint.index.json"), 0u);
    training.take_step();
    save.finish();
    expect_loads(directory.path(), groups, expected);
  }
}

TEST(BackgroundSave, OfWhichOneRankCannotWriteItsShareIsAnErrorOnAll) {
  const SharedDirectory directory;
  const auto& groups = parallel_groups();
  InTraining training(groups);
  training.take_step();
  save_checkpoint(directory.path(), *training.model, *training.optimizer, {}, groups);
  const auto before = files_in(directory.path());
  const auto expected = training.numbers();
  training.take_step();
  {
    const FileSizeLimit limit(world()->rank() == world()->size() - 1 ? 200 : RLIM_INFINITY);
    BackgroundSave save(directory.path(), *training.model, *training.optimizer, {}, groups);
    expect_checkpoint_error([&] { save.finish(); }, "write " + directory.path().string());
  }
  EXPECT_EQ(files_in(directory.path()), before);
  expect_loads(directory.path(), groups, expected);
}

TEST(BackgroundSave, ThatIsDroppedLeavesTheFormerOne) {
  const SharedDirectory directory;
  const auto& groups = parallel_groups();
  InTraining training(groups);
  save_checkpoint(directory.path(), *training.model, *training.optimizer, {}, groups);
  const auto before = files_in(directory.path());
  const auto expected = training.numbers();
  training.take_step();
  {
    const BackgroundSave dropped(directory.path(), *training.model, *training.optimizer, {},
                                 groups);
  }
  EXPECT_EQ(files_in(directory.path()), before);
  expect_loads(directory.path(), groups, expected);
}

}  // namespace
}  // namespace anabranch::test
