#pragma once

#include <anabranch/expert_mover.h>
#include <anabranch/optimizers.h>
#include <anabranch/parameters.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "data/data.h"
#include "metrics/metrics.h"
#include "model/model.h"
#include "metrics/moment.h"
#include "options.h"

namespace train_lm {

/// A step whose work is under way on a GPU (on a CPU it is done): its numbers come when it has ended.
struct LaunchedStep {
  Moment begin;
  StepRecord record = {};                                 ///< what the host knows already
  torch::Tensor numbers = {};                             ///< [7] fp64 on the host: see Stepper
  torch::Tensor load = {};                                ///< [layers, experts] int64 on the host
  std::vector<std::pair<Moment, Moment>> heads = {};      ///< head and loss of each micro-batch
  std::optional<std::pair<Moment, Moment>> summing = {};  ///< of gradients between ranks
  std::optional<Moment> end = {};
  std::string refusal = {};  ///< of the routing on this rank, if any
};

/// What a step has come to, over all ranks.
struct StepResult {
  StepRecord record;
  int signal = 0;        ///< that any rank has received, or 0
  bool written = false;  ///< on every rank
  std::string refusal;   ///< of the routing on this rank, if any
};

/// Optimizer steps. The host does not wait for the GPU within one.
class Stepper {
 public:
  Stepper(const Options& options, const TokenSource& data, const anabranch::ParallelGroups& groups,
          LanguageModel model, std::vector<anabranch::ParallelParameter> parameters,
          anabranch::ParallelOptimizer& optimizer);

  /// Forward, backward and update for the batch at `position`. `with_norms`: those of the gradient's parts, for which
  /// the host waits. `written`: this rank's part of a checkpoint. Collective.
  LaunchedStep launch(const BatchPosition& position, bool with_norms, bool written);
  /// Waits for it.
  StepResult finish(LaunchedStep step);

 private:
  /// Sums over the micro-batches of a step, on the device.
  struct Sums {
    torch::Tensor loss;          ///< [] fp64 Σ of this rank's tokens
    torch::Tensor balance_loss;  ///< [] fp64, of this rank's group
    torch::Tensor z_loss;        ///< [] fp64, of this rank's group
    torch::Tensor load;          ///< [layers, experts] int64, of this rank's group
    std::vector<std::pair<Moment, Moment>> heads = {};  ///< head and loss, forward
  };

  /// Leaves the gradients of the global batch's mean loss, of this rank; what is refused is said in `refusal`,
  /// and then they are not finite.
  Sums gradients_of_batch(const torch::Tensor& windows, uint64_t seed, std::string& refusal);
  Sums forward_and_backward(const torch::Tensor& windows, uint64_t seed);
  /// Of what the routers of this rank draw in a step.
  uint64_t routing_seed(int64_t step) const;
  void add_micro_batch(const torch::Tensor& windows, int64_t pieces, Sums& sums);
  /// Returns the norm of the gradient, [] fp64.
  torch::Tensor update(LaunchedStep& step, bool with_norms);
  /// Makes them sums over all ranks, and adds `norm`.
  torch::Tensor shared_numbers(const Sums& sums, const torch::Tensor& norm, bool written);

  const Options& options_;
  const TokenSource& data_;
  const anabranch::ParallelGroups& groups_;
  LanguageModel model_;
  std::vector<anabranch::ParallelParameter> parameters_;
  anabranch::ParallelOptimizer& optimizer_;
  std::optional<anabranch::ExpertMover> mover_;
  torch::Device device_;
  double global_tokens_;  // of one step
};

}  // namespace train_lm
