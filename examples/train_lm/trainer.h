#pragma once

#include <anabranch/parameters.h>

#include <memory>
#include <optional>

#include "data.h"
#include "metrics.h"
#include "model.h"
#include "options.h"
#include "progress.h"
#include "run_directory.h"

namespace train_lm {

/// How training ended.
struct Outcome {
  Metrics last;           ///< of the last step; default values if there was none left to do
  int signal = 0;         ///< the signal that interrupted it, or 0
  bool complete = false;  ///< false: there are steps left for --resume
};

/// The steps of a run, from `state` on. Every rank has one.
class Trainer {
 public:
  Trainer(const Options& options, const Text& text, const anabranch::ParallelGroups& groups,
          LanguageModel model, torch::optim::Optimizer& optimizer, const RunDirectory& directory);

  /// Trains, measures, logs and saves until the last step, `stop_at` or a signal. Collective.
  Outcome run(RunState state, Progress& progress);

 private:
  /// What a step leaves to be reported, and the signal that any rank has received.
  struct StepResult {
    Metrics metrics;
    int signal = 0;
  };
  StepResult step(int64_t step);
  void report(const Metrics& metrics, Progress& progress);
  bool is_due(int64_t step, int64_t interval) const;

  const Options& options_;
  const Text& text_;
  const anabranch::ParallelGroups& groups_;
  LanguageModel model_;
  torch::optim::Optimizer& optimizer_;
  const RunDirectory& directory_;
  std::optional<MetricsFile> metrics_file_;  // on rank 0
};

}  // namespace train_lm
