#pragma once

#include <anabranch/moe_layer.h>
#include <anabranch/optimizers.h>

#include <string>
#include <vector>

namespace anabranch {

/// When experts move, for how much, and within what.
struct ExpertMoverOptions {
  int64_t interval = 1000;  ///< steps between choices
  /// What moves must take off the fullest rank's load, else all stay where they are.
  double least_gain = 0.05;
  /// Of this rank, whose experts rather move within: an NVLink domain. Empty: what the launcher says (discover_rank).
  std::string node = {};
};

/// What has been moved, of all ranks, and what it cost.
struct ExpertMoves {
  int64_t experts = 0;  ///< that have gone to another place
  int64_t bytes = 0;    ///< between ranks
  double seconds = 0;   ///< of this rank, to the end of the moves
  /// The fullest rank's load over the mean, in the steps before the last choice; mean over the layers.
  double before = 0;
  double after = 0;  ///< what it would have been as they lie now
};

/// Moves experts between steps, so that the ranks have equal loads: after every `interval` steps the experts of a
/// layer are placed anew by their loads in these steps, each rank holding as many as before, and their weights and
/// optimizer states go where they are to lie. Training is what it would have been within rounding; checkpoints
/// load at any placement. For layers of whole experts that do not lie in blocks: MoEOptions::placement "movable".
class ExpertMover {
 public:
  /// Collective over `groups.world`. All that are given outlive the mover. InputError for layers of another placement.
  ExpertMover(torch::nn::Module& model, const ParallelOptimizer& optimizer,
              const ParallelGroups& groups, const ExpertMoverOptions& options);

  /// After each step, when gradients have been dropped (zero_gradients), and before the next forward. `load`
  /// [layers, E] int64: each layer's MoEOutput::expert_load, in the order of the model's modules, summed over
  /// `groups.expert_replicas`. The host waits for the device after every `interval` steps alone. Collective; returns
  /// whether anything was moved, alike on all ranks.
  bool after_step(const torch::Tensor& load);

  /// Since the mover was made; `before` and `after` of the last choice.
  const ExpertMoves& moves() const { return moves_; }

 private:
  void move(MoELayerImpl& layer, const ExpertPlacement& to);

  torch::nn::Module& model_;
  const ParallelOptimizer& optimizer_;
  const ParallelGroups& groups_;
  ExpertMoverOptions options_;
  std::vector<int> node_of_;  ///< [W] of the expert-parallel group
  std::vector<std::shared_ptr<MoELayerImpl>> layers_;
  int64_t steps_ = 0;
  torch::Tensor load_;  ///< [layers, E] sum since the last choice
  ExpertMoves moves_;
};

}  // namespace anabranch
