#pragma once

#include <anabranch/checkpoint.h>
#include <gtest/gtest.h>
#include <torch/optim/adamw.h>

#include <filesystem>
#include <memory>
#include <set>
#include <string>

#include "support/sharded_model.h"

namespace anabranch::test {

/// A model and an AdamW on it, two groups with options of their own.
struct Training {
  std::shared_ptr<ShardedModel> model;
  std::unique_ptr<torch::optim::AdamW> optimizer;
};
Training make_training(const ShardedModel::Options& options, const Communicator& expert_parallel,
                       uint64_t seed, bool amsgrad = false);

/// `count` steps with gradients from `seed`, seed + 1, ...
void train(Training& training, uint64_t seed, int count);

/// Parameters, buffers and optimizer state of `actual` are those of `whole`, a model on one rank,
/// bit for bit.
void expect_part_of(const Training& actual, const Training& whole);

/// Bits of everything that loading could change.
class Snapshot {
 public:
  explicit Snapshot(const Training& training);
  void expect_unchanged() const;

 private:
  std::vector<torch::Tensor> tensors() const;

  const Training& training_;
  std::vector<torch::Tensor> before_;
};

/// The call throws a CheckpointError whose message holds `text`.
template <typename Call>
void expect_checkpoint_error(const Call& call, const std::string& text) {
  try {
    call();
    ADD_FAILURE() << "no error; expected a CheckpointError that says \"" << text << "\"";
  } catch (const CheckpointError& error) {
    EXPECT_NE(std::string(error.what()).find(text), std::string::npos)
        << error.what() << "\n  does not say \"" << text << "\"";
  }
}

/// What is there once every rank of the world has come here. Collective.
std::set<std::string> files_in(const std::filesystem::path& directory);

}  // namespace anabranch::test
