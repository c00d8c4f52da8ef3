#pragma once

#include <anabranch/optimizers.h>
#include <anabranch/parameters.h>

#include <chrono>
#include <deque>
#include <memory>
#include <optional>

#include "data/data.h"
#include "metrics/metrics.h"
#include "model/model.h"
#include "options.h"
#include "metrics/progress.h"
#include "run_directory.h"
#include "step.h"

namespace train_lm {

class Stopwatch {
 public:
  double seconds() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

/// How training ended.
struct Outcome {
  StepRecord last;        ///< of the last step; default values if there was none left to do
  int signal = 0;         ///< the signal that interrupted it, or 0
  bool complete = false;  ///< false: there are steps left for --resume
  bool diverged = false;  ///< steps in a row whose gradients were not finite have ended it
};

/// The steps of a run, from `state` on. Every rank has one. On a GPU a step is launched before the
/// host has the numbers of the one before.
class Trainer {
 public:
  Trainer(const Options& options, const TokenSource& data, const anabranch::ParallelGroups& groups,
          LanguageModel model, std::vector<anabranch::ParallelParameter> parameters,
          anabranch::ParallelOptimizer& optimizer, const RunDirectory& directory);

  /// Trains, measures, logs and saves until the last step, `stop_at` or a signal. Collective.
  Outcome run(RunState state, Progress& progress);

 private:
  /// One step more; whether another is to follow.
  bool step_forward(RunState& state, Progress& progress);
  /// Whether the host is to have the numbers of `step` before the next is launched.
  bool waits_for(int64_t step) const;
  /// Waits for the oldest step under way, and reports it.
  void settle(Progress& progress);
  /// Fills in what held-out data says. Collective.
  void validate(StepRecord& record);
  /// Collective.
  void report(StepRecord& record, Progress& progress);
  StepCost cost() const;
  void note_skipped(const StepResult& result);
  bool saves_after(int64_t step) const;
  /// Saves, or begins to. Collective.
  void save(const RunState& state);
  /// What has been begun, if anything has. Collective.
  void finish_save();
  void begin_stage_times(int64_t step);
  void end_stage_times(int64_t step, Progress& progress);
  std::string exposed_exchange(double steps);
  bool is_reported(int64_t step) const;
  bool is_due(int64_t step, int64_t interval) const;

  const Options& options_;
  const TokenSource& data_;
  const anabranch::ParallelGroups& groups_;
  LanguageModel model_;
  anabranch::ParallelOptimizer& optimizer_;
  const RunDirectory& directory_;
  Stepper stepper_;
  std::optional<MetricsLog> log_;  // on rank 0
  std::unique_ptr<anabranch::BackgroundSave> saving_;

  std::deque<LaunchedStep> under_way_;
  Outcome outcome_;
  RunState sound_;        // after the last step that was not skipped
  int64_t in_a_row_ = 0;  // skipped

  double head_seconds_ = 0;  // of this rank since the last line, and its sequences
  int64_t head_sequences_ = 0;
  int64_t first_step_ = 0;     // done before this run
  double seconds_before_ = 0;  // that earlier runs took
  Stopwatch run_time_;
};

}  // namespace train_lm
