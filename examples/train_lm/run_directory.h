#pragma once

#include <anabranch/checkpoint.h>
#include <anabranch/optimizers.h>
#include <anabranch/parameters.h>
#include <torch/nn/module.h>

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "data/data.h"
#include "options.h"

namespace train_lm {

/// How far a run has come.
struct RunState {
  int64_t step = 0;
  int64_t sequences = 0;  ///< of the training data that the steps took
  double seconds = 0;
};

/// What a run leaves behind, and how another continues from it.
class RunDirectory {
 public:
  RunDirectory(const Options& options, const TokenSource& data) : options_(options), data_(data) {}

  std::filesystem::path metrics() const { return options_.output / "metrics.jsonl"; }
  std::filesystem::path sample() const { return options_.output / "sample.txt"; }
  std::filesystem::path checkpoint() const { return options_.output / "checkpoint"; }
  /// The options of the run, for `resume` and for people.
  std::filesystem::path description() const { return options_.output / "options.json"; }

  /// Makes the directory; an earlier run's checkpoint becomes checkpoint.previous. Throws Refusal.
  /// Collective.
  void begin(anabranch::Communicator& world) const;

  /// Fills model and optimizer from the checkpoint. Throws Refusal if there is none or it is
  /// another model's. `notes` become the differences that change the curve but not the model.
  /// Collective.
  RunState resume(torch::nn::Module& model, anabranch::ParallelOptimizer& optimizer,
                  const anabranch::ParallelGroups& groups, std::vector<std::string>& notes) const;

  /// Collective.
  void save(const RunState& state, const torch::nn::Module& model,
            const anabranch::ParallelOptimizer& optimizer,
            const anabranch::ParallelGroups& groups) const;
  /// The same, of which the files are written by a thread. Collective.
  std::unique_ptr<anabranch::BackgroundSave> begin_save(
      const RunState& state, const torch::nn::Module& model,
      const anabranch::ParallelOptimizer& optimizer, const anabranch::ParallelGroups& groups) const;

 private:
  anabranch::CheckpointMetadata metadata_of(const RunState& state) const;
  void write_description() const;
  std::vector<std::string> compare_with_description() const;

  const Options& options_;
  const TokenSource& data_;
};

}  // namespace train_lm
