#pragma once

#include <anabranch/parameters.h>

#include <memory>
#include <optional>
#include <utility>

#include "data.h"
#include "metrics.h"
#include "model.h"
#include "options.h"
#include "progress.h"
#include "run_directory.h"

namespace train_lm {

/// How training ended.
struct Outcome {
  StepRecord last;        ///< of the last step; default values if there was none left to do
  int signal = 0;         ///< the signal that interrupted it, or 0
  bool complete = false;  ///< false: there are steps left for --resume
};

/// The steps of a run, from `state` on. Every rank has one.
class Trainer {
 public:
  Trainer(const Options& options, const TokenSource& data, const anabranch::ParallelGroups& groups,
          LanguageModel model, torch::optim::Optimizer& optimizer, const RunDirectory& directory);

  /// Trains, measures, logs and saves until the last step, `stop_at` or a signal. Collective.
  Outcome run(RunState state, Progress& progress);

 private:
  /// One step, on the batch at `position`; what there is to report of it, and the signal that any rank has received, or 0.
  std::pair<StepRecord, int> step(const BatchPosition& position);
  /// Leaves the gradients of the global batch's mean loss; returns this rank's Σ of losses.
  double backward(const Batch& batch, StepRecord& record);
  void update(StepRecord& record);
  /// Makes what `record` holds of this rank or its group that of all; returns the signal.
  int sum_over_ranks(double loss_sum, StepRecord& record);
  /// Fills in what held-out data says. Collective.
  void validate(StepRecord& record);
  /// Collective.
  void report(StepRecord& record, Progress& progress);
  StepCost cost() const;
  bool is_reported(int64_t step) const;
  bool is_due(int64_t step, int64_t interval) const;

  const Options& options_;
  const TokenSource& data_;
  const anabranch::ParallelGroups& groups_;
  LanguageModel model_;
  torch::optim::Optimizer& optimizer_;
  const RunDirectory& directory_;
  double global_tokens_;           // of one step
  std::optional<MetricsLog> log_;  // on rank 0
};

}  // namespace train_lm
