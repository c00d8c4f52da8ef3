#pragma once

#include <anabranch/expert_mover.h>
#include <torch/types.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "metrics/cost.h"
#include "metrics/events.h"
#include "metrics/spikes.h"

namespace train_lm {

/// What is known of one step, over all ranks.
struct StepRecord {
  int64_t step = 0;
  int64_t tokens = 0;    ///< of the global batch
  double loss = 0;       ///< mean over the global batch, in nats a token, without auxiliary losses
  bool skipped = false;  ///< its gradient was not finite, and the parameters stayed as they were
  double seconds = 0;    ///< from the step's begin to its end, without validation
  double data_seconds = 0;  ///< of these, until the batch was there
  /// Of these, while gradients were summed between ranks, which nothing runs beside.
  std::optional<double> exposed_communication_seconds;
  /// Of these, in this rank's head and loss forward, for so many sequences of its own: nothing in it waits for a rank.
  double head_seconds = 0;
  int64_t head_sequences = 0;
  double run_seconds = 0;  ///< since the run began
  double learning_rate = 0;
  double gradient_norm = 0;                                    ///< before clipping
  std::vector<std::pair<std::string, double>> gradient_norms;  ///< of each part, where measured
  double balance_loss = 0;    ///< mean over layers; 1 is perfect balance
  double z_loss = 0;          ///< mean over layers
  torch::Tensor expert_load;  ///< [layers, experts] int64 assignments
  int64_t memory = 0;         ///< peak bytes so far, of the rank that takes most
  /// Of each rank, milliseconds of a sequence's head and loss since the line before; NaN where it had no sequence.
  std::vector<double> rank_milliseconds;
  std::optional<anabranch::ExpertMoves>
      moves;  ///< so far, where experts have moved after this step
  int ranks = 1;
  std::optional<double> validation_loss;  ///< nats a token on held-out data
  std::optional<double> validation_bpb;   ///< bits a byte, where a token's bytes are known
};

/// What a run says of its steps: every one is added, some are written. Of rank 0 alone.
/// metrics.jsonl has one object a line, on disk as soon as it is written; a file for TensorBoard beside it
/// has its numbers.
class MetricsLog {
 public:
  /// Keeps the lines of steps up to `last_step` that an earlier run wrote; 0: none.
  MetricsLog(const std::filesystem::path& file, int64_t last_step, const StepCost& cost);

  /// What there is to say of this step at once: that it was skipped, or its loss leaps; else "".
  std::string add(const StepRecord& record);
  /// Writes the line of the step added last; speed is that of all steps since the line before.
  /// Returns it for people: "step 20/600  loss 2.345  ...".
  std::string write(const StepRecord& record, int64_t steps);

 private:
  /// Of the steps since the last line.
  struct Interval {
    int64_t steps = 0;
    int64_t tokens = 0;
    int64_t skipped = 0;
    double seconds = 0;
    double data_seconds = 0;
    std::optional<double> exposed_seconds;
    std::vector<int64_t> spikes;
  };
  nlohmann::json describe(const StepRecord& record) const;
  /// FLOP/s that the model asks of each rank.
  double model_flops(const StepRecord& record) const;

  std::ofstream stream_;
  EventFile events_;
  StepCost cost_;
  SpikeDetector spikes_;
  Interval interval_;
  std::optional<anabranch::ExpertMoves> moves_;  ///< so far
};

}  // namespace train_lm
