#pragma once

#include <anabranch/exchange.h>

#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "support/stage_times.h"

namespace anabranch {

/// When rows travel: from where they are given on, beside what the caller does, or while it waits for them.
enum class Travel { kBeside, kInTurn };

/// Tokens on their way to the ranks of their experts, in the plan's chunks, of which all start at once and
/// come one after another. Plan and communicator outlive it.
class Dispatching {
 public:
  /// Collective.
  Dispatching(Communicator& communicator, const Payload& tokens, const ExchangePlan& plan,
              Travel travel);
  /// Of rows that have arrived.
  Dispatching(const ExchangePlan& plan, torch::Tensor rows)
      : plan_(plan), received_{std::move(rows), {}} {}

  /// Waits for the rows of the next chunk, and with the first for the values. Collective where they travel
  /// in turn.
  void wait_for_next();
  /// In which the rows of a chunk are there when it has been waited for. At the source they must stay as
  /// they are until the last one has been.
  const Payload& received() const { return received_; }

 private:
  const ExchangePlan& plan_;
  Payload received_;
  torch::Tensor arriving_values_;
  std::vector<std::unique_ptr<Pending>> chunks_;
  size_t next_ = 0;
  std::optional<StageTimes::Measured> under_way_;
};

/// Results on their way back, a chunk at a time. Plan and communicator outlive it.
class Combining {
 public:
  /// `returned`: [S, h], where rows come to; undefined: to memory of their own.
  Combining(Communicator& communicator, const ExchangePlan& plan, Travel travel,
            torch::Tensor returned = {});

  /// The next chunk's rows, [its rows, h]; with the last chunk the values [P], if there are any.
  /// Collective.
  void send(const Payload& results);
  /// When all have been sent: rows [S, h] as they come back, values [A] by (expert, token). Collective where
  /// they travel in turn.
  Payload finish_unsummed();
  /// The same with the rows of a token summed, [T, h], and values at their slots, [T, top_k].
  Payload finish();

 private:
  Communicator& communicator_;
  const ExchangePlan& plan_;
  Travel travel_;
  std::vector<ExchangeChunk> chunks_;
  std::vector<std::unique_ptr<Pending>> pending_;
  int64_t next_row_ = 0;
  Payload returned_;  ///< rows [S, h], values by (expert, token)
  std::optional<StageTimes::Measured> under_way_;
};

}  // namespace anabranch
