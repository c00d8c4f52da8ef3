#pragma once

#include "kernels/cuda/launch.h"

// Launchers of plan.cu: see launch.h.

namespace anabranch::cuda {

struct RoutingToCheck {
  Scalar scalar;  ///< fp32 or fp64, of the weights
  const int64_t* expert_ids;
  const void* weights;
  int64_t tokens;
  int64_t top_k;
  int64_t num_experts;
  int64_t least_id;  ///< 0, or −1 where an id of −1 is none
};
/// The tokens start at −1. See RoutingCheck.
void launch_check_routing(const RoutingToCheck& routing, int64_t* first_nonfinite,
                          int64_t* first_invalid, void* checked_weights, cudaStream_t stream);

/// int64 elements of scratch that `launch_group` needs.
int64_t group_scratch(int64_t count, int64_t groups);

/// offsets [groups+1], members [count]: positions by (key, position). Keys outside [0, groups) count
/// as the last.
void launch_group(const int64_t* keys, int64_t count, int64_t groups, int64_t* scratch,
                  int64_t* offsets, int64_t* members, cudaStream_t stream);

/// Which (token, rank) pairs exist. Each has a first assignment, the one of the lowest slot.
struct TokenRanks {
  /// [T·k] flat index of the first assignment of the same (token, rank); of a negative id, its own
  int64_t* first;
  int64_t* key;    ///< [T·k] rank at first assignments, W elsewhere
  int64_t* ranks;  ///< [T] distinct ranks of a token
};

/// `first_expert` [W+1] on the device. Negative ids are of no rank.
void launch_token_ranks(const int64_t* expert_ids, int64_t tokens, int64_t top_k,
                        const int64_t* first_expert, int64_t ranks, const TokenRanks& pairs,
                        cudaStream_t stream);

/// From `sent` [T·k], flat assignments by (key, token): the token of each sent row, and
/// `row_of` [T·k], its inverse.
void launch_send_tokens(const int64_t* sent, int64_t count, int64_t top_k, int64_t* send_tokens,
                        int64_t* row_of, cudaStream_t stream);

void launch_token_rows(const TokenRanks& pairs, const int64_t* row_of, const int64_t* token_offsets,
                       int64_t tokens, int64_t top_k, int64_t ranks, int64_t* token_rows,
                       cudaStream_t stream);

/// `segments` [W+1]: first row of each rank's segment.
void launch_segment_rows(const int64_t* send_order, int64_t count, const TokenRanks& pairs,
                         const int64_t* row_of, const int64_t* segments, int32_t* segment_rows,
                         cudaStream_t stream);

/// See LocalPlan. `send_order` and `expert_offsets` [E+1] are those of the ids' grouping by expert.
struct Local {
  const int64_t* expert_ids;
  const int64_t* send_order;
  const int64_t* expert_offsets;
  int64_t tokens;
  int64_t top_k;
  int64_t experts;
  int64_t* expert_counts;
  int64_t* longest_first;
  int64_t* assignment_rows;
  int64_t* row_offsets;
  int64_t* row_members;
  int64_t* places;
  // See LateRefusal; null where there is none.
  const int64_t* first_nonfinite;
  const int64_t* first_invalid;
  int64_t* told;
  // Of the assignments as they lie, and in the plan's order; null where there are none.
  const void* weights;
  void* ordered_weights;
  bool weights_are_double;
};

void launch_local(const Local& plan, cudaStream_t stream);

/// `source_ends` [W·L] by (source, expert), `expert_ends` [L·W] by (expert, source) and `row_ends`
/// [W]: inclusive running sums of the counts; L local experts.
void launch_order_arrivals(const int32_t* segment_rows, int64_t count, const int64_t* source_ends,
                           const int64_t* expert_ends, const int64_t* row_ends, int64_t ranks,
                           int64_t experts, int64_t none, int64_t* received_order,
                           int64_t* assignment_rows, cudaStream_t stream);

}  // namespace anabranch::cuda
