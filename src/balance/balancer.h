#pragma once

#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "balance/lane.h"
#include "balance/loan_choice.h"
#include "balance/rates.h"

namespace anabranch {

enum class Balance {
  kOff,     ///< tokens travel
  kShadow,  ///< weights travel to all ranks where nominal rates make that shorter: in all runs alike
  kReplicas,  ///< to as few as even the ranks' loads
  kGather,    ///< to the ranks of a group, within which tokens do not
  kAuto,      ///< any of these, by rates that the first step measures
};
/// InputError where `options.balance` says none of them.
Balance balance_of(const MoEOptions& options);
/// Of "gather:G" the G, of "gather" all ranks. InputError where they do not divide the ranks, unless there is but one.
int64_t gathered_ranks(const MoEOptions& options, int64_t ranks);

/// Decides, step by step, what travels to whom: tokens, or weights. Alike on all ranks.
class Balancer {
 public:
  Balancer(const MoEOptions& options, const ExpertPlacement& placement)
      : options_(options), placement_(placement) {}

  /// Experts lie otherwise from now on.
  void place(ExpertPlacement placement) { placement_ = std::move(placement); }

  /// Whether there is anything to decide.
  bool is_on() const { return placement_.num_ranks > 1 && balance_of(options_) != Balance::kOff; }
  /// For `counts` as Loads has them. Collective at the first step, which measures.
  const LoanChoice& choose(const torch::Tensor& counts, const FeedForward& expert,
                           const ExpertProjections& experts, Communicator& communicator);
  /// By which weights travel beside what is computed, over ranks of `communicator`; null where they do not: on a GPU,
  /// and where nothing may be under way beside its other calls. Collective at the first call, which makes it.
  std::shared_ptr<Lane> lane(Communicator& communicator, torch::Device device);
  /// In how many rounds what travels did so.
  void note_rounds(int64_t rounds) { rounds_ = rounds; }

  /// What was done in the last step, and why.
  std::string explain() const;

 private:
  MoEOptions options_;
  ExpertPlacement placement_;
  std::optional<Rates> rates_;
  std::optional<LoanChoice> choice_;
  int64_t rounds_ = 0;
  std::shared_ptr<Lane> lane_;
};

}  // namespace anabranch
