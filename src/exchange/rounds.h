#pragma once

#include <anabranch/exchange.h>

#include <vector>

#include "kernels/csr.h"

namespace anabranch {

/// A step's exchange, some of its rows at a time.
struct Rounds {
  /// Each of some of the rows, with all assignments of theirs: as any plan but for token_offsets and
  /// token_rows, which are undefined, since a token's rows may go in several rounds.
  std::vector<ExchangePlan> plans;
  /// Of T tokens: their rows among those that come back in all rounds, one behind another, by rank.
  Csr rows_of_tokens;
};

/// The fewest rounds in which no rank is sent more than `limit` rows at once, at least one a rank; 0: one
/// round. The same on all ranks. Collective, unless the limit is 0 or a rank is alone.
int64_t count_rounds(const ExchangePlan& plan, int64_t limit, Communicator& communicator);

/// `plan`, which is in no chunks, in so many rounds: of what a rank sends to another each has its share, in
/// the order of tokens, so that all links are in use in each. Assignments keep their order within a round,
/// and a token's rows that in which they are added. No communication: both ends know how rows are shared.
/// On a GPU the host waits for the counts of each round.
Rounds in_rounds(const ExchangePlan& plan, int64_t rounds);

}  // namespace anabranch
