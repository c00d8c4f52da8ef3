#pragma once

#include <anabranch/expert_counts.h>
#include <torch/types.h>

#include <cstdint>
#include <vector>

#include "kernels/csr.h"
#include "kernels/kernels.h"
#include "kernels/told.h"

namespace anabranch {

/// What one rank's tokens send where. [T, k] routing, E experts, W ranks; all int64.
struct SendPlan {
  torch::Tensor expert_counts;  ///< [E] assignments per expert (then [1] of none, if there may be)
  torch::Tensor rank_rows;      ///< [W] distinct tokens per rank
  torch::Tensor send_tokens;    ///< [≥ S] tokens by (rank, token); S = Σ rank_rows
  torch::Tensor token_offsets;  ///< [T+1]
  torch::Tensor token_rows;     ///< [≥ S] rows of each token in send_tokens, ascending
  torch::Tensor send_order;     ///< [T·k] flat (token, slot), by (expert, token)
  torch::Tensor segment_rows;   ///< [T·k] int32, row of each, within its rank's segment
};

/// Arrived assignments by (expert, source, token).
struct ArrivalOrder {
  torch::Tensor received_order;   ///< [P] place in the order of arrival
  torch::Tensor assignment_rows;  ///< [P] received row
};

/// Where what arrives ends: inclusive running sums of the counts, which can be taken before it does.
struct ArrivalEnds {
  torch::Tensor by_source;  ///< [W·L] assignments, by (source, expert); L local experts
  torch::Tensor by_expert;  ///< [L·W] the same by (expert, source)
  torch::Tensor rows;       ///< [W] rows

  /// `rows` [W] and `counts` [W, L]: rows and assignments per expert that come from each source.
  static ArrivalEnds of(const torch::Tensor& rows, const torch::Tensor& counts) {
    // Of one rank both orders are the same, and its rows end where they are.
    const bool one = counts.size(0) == 1;
    const auto by_source = counts.flatten().cumsum(0);
    return {by_source, one ? by_source : counts.t().flatten().cumsum(0),
            one ? rows.contiguous() : rows.cumsum(0)};
  }
};

/// What a rank plans that has all experts: every token is a row that stays. [T, k] routing, E experts;
/// all int64.
struct LocalPlan {
  torch::Tensor expert_counts;    ///< [E]
  ExpertCounts::OnDevice counts;  ///< the same, as the products read them
  torch::Tensor send_order;       ///< [T·k] flat (token, slot), by (expert, token)
  torch::Tensor assignment_rows;  ///< [T·k] token of each of these
  Csr by_row;                     ///< of T tokens, their places in send_order
  torch::Tensor places;           ///< 0, 1, 2, .., of max(T + 1, T·k) numbers
  torch::Tensor weights;  ///< [T·k] of the assignments in this order; undefined if none were given
};

/// What is wrong with a routing [T, k] from outside.
struct RoutingCheck {
  torch::Tensor first_nonfinite_token;  ///< [] int64: first with a weight that is NaN or Inf, or -1
  torch::Tensor first_invalid_token;  ///< [] int64: first with an id outside [0, E) or twice, or -1
  torch::Tensor weights;              ///< [T, k], NaN in tokens with either
};

/// How a step on a GPU that the host does not wait for tells it what is wrong: int64 numbers that both
/// see, written where there is something to tell.
struct LateRefusal {
  torch::Tensor first_nonfinite_token;  ///< [] as above
  torch::Tensor first_invalid_token;    ///< [] or undefined
  torch::Tensor told;                   ///< [2] in pinned memory: the two tokens
};

/// What all ranks make of what they have told each other (Told) of a step whose counts stay on the device, W
/// ranks, L local experts; all int64. Lists of counts are three times [W]: to each rank, from each, and to each
/// again, so that rows and what comes back each find theirs as two neighbours.
struct Verdict {
  torch::Tensor spoilt;             ///< [] 1: nothing is to move, and all counts are 0
  torch::Tensor row_counts;         ///< [3, W]
  torch::Tensor assignment_counts;  ///< [3, W]
  ExpertCounts::OnDevice counts;    ///< of the local experts
  ArrivalEnds ends;
};

/// Who sends what to whom, from the ids of experts.
class PlanKernels : public Kernels<PlanKernels> {
 public:
  static const PlanKernels& cpu();
  static const PlanKernels& cuda();

  /// With `may_skip` an id of -1 is none and valid, and so is its weight, whatever it is.
  virtual RoutingCheck check_routing(const torch::Tensor& expert_ids, const torch::Tensor& weights,
                                     int64_t num_experts, bool may_skip = false) const = 0;
  /// `first_expert` [W+1]: rank r owns experts first_expert[r] .. first_expert[r+1]−1.
  /// The result for ids that are not valid is discarded by the caller, but safe to compute. With
  /// `may_skip` ids of -1 come last in send_order and segment_rows, behind all assignments, and last
  /// in expert_counts, which then has E+1 elements. A rank is sent the tokens with an expert there; of
  /// a rank alone every token is a row, for then x itself is what arrives.
  virtual SendPlan plan_send(const torch::Tensor& expert_ids,
                             const std::vector<int64_t>& first_expert,
                             bool may_skip = false) const = 0;
  /// Of ids as above, where none is -1; `weights` [T, k] fp32 or fp64, or undefined. `refusal`, if given:
  /// tells the host on the way.
  virtual LocalPlan plan_local(const torch::Tensor& expert_ids, const torch::Tensor& weights,
                               int64_t num_experts, const LateRefusal* refusal = nullptr) const = 0;
  /// Brings arrivals into expert-major order. `segment_rows` [P] int32: row of each arrived
  /// assignment within its source's segment, ordered by (source, expert). Where fewer may have come than there
  /// is room for, `none` ≥ 0: the places behind them are their own, and of that row.
  virtual ArrivalOrder order_arrivals(const torch::Tensor& segment_rows, const ArrivalEnds& ends,
                                      int64_t none = -1) const = 0;
  /// `told` [W, kTold + W + E]; `first_expert` [W+1], on the same device; of `rank` and its `local` experts. A step
  /// is spoilt where a rank refuses its routing, has another form than rank 0, or would receive more than it has
  /// room for, and where a failed exchange has left no counts. `mailbox` [4], in memory that the host sees as
  /// well, is told what LateRefusals has in it.
  virtual Verdict judge(const torch::Tensor& told, const torch::Tensor& first_expert, int64_t rank,
                        int64_t local, const torch::Tensor& mailbox) const = 0;
  /// Groups positions 0..P−1 of `group_of` [P] by their value in [0, groups).
  virtual Csr group(const torch::Tensor& group_of, int64_t groups) const = 0;
};

}  // namespace anabranch
