#pragma once

#include <anabranch/communicator.h>
#include <anabranch/options.h>

#include <cstdint>
#include <mutex>
#include <optional>
#include <vector>

#include "support/moment.h"

namespace anabranch {

/// In how many chunks rows travel beside the products, for the steps of a layer; 0: they do not. Where
/// `MoEOptions::overlap` is "auto", the first steps of every kPeriod take each way in turn, the others the one that
/// was the quickest then: loads and skews change during a run.
class OverlapChoice {
 public:
  static constexpr int64_t kPeriod = 2000;
  static constexpr int64_t kRounds = 4;  ///< of all ways; the first is not measured
  /// What is not this much quicker than in turn is noise.
  static constexpr double kWorth = 0.02;

  /// InputError where the option names no way.
  explicit OverlapChoice(const MoEOptions& options);

  struct Way {
    int64_t degree = 0;
    int64_t place = -1;  ///< where what the step takes is to be noted; −1: nowhere
  };
  /// Of the step that begins. Collective: where a choice is due, ranks tell each other what theirs took, and the
  /// slowest one's counts.
  Way begin_step(Communicator& communicator, torch::Device device);
  /// When something of such a step begins, if it is to be noted.
  static std::optional<Moment> begin(const Way& way, torch::Device device);
  /// What its forward or its backward took until now.
  void note(const Way& way, bool backward, std::optional<Moment> begin, torch::Device device);

 private:
  struct Taken {
    Moment begin;
    Moment end;
  };
  struct Measured {
    int64_t degree;
    std::vector<Taken> forward, backward;
  };

  void choose(Communicator& communicator);

  std::mutex mutex_;  ///< backward is another thread's
  std::vector<Measured> ways_;
  size_t chosen_ = 0;
  int64_t step_ = 0;
};

}  // namespace anabranch
