#pragma once

#include <anabranch/communicator.h>
#include <anabranch/expert_counts.h>
#include <anabranch/expert_placement.h>
#include <anabranch/routing.h>

#include <array>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

namespace anabranch {

/// What of a plan's rows goes at once: those of neighbouring local experts, or of one expert from some of the
/// ranks, see `exchange/chunks.h`.
struct ExchangeChunk {
  int64_t first_assignment;            ///< in the order of experts
  int64_t assignments;                 ///< of this rank's experts
  std::vector<int64_t> send_rows;      ///< [W] tokens to each rank of their experts
  std::vector<int64_t> receive_rows;   ///< [W]
  std::vector<int64_t> return_rows;    ///< [W] results to each rank of their tokens
  std::vector<int64_t> returned_rows;  ///< [W]
};

/// Who sends which rows to whom in one step: made once, used by forward and backward.
///
/// Experts are places throughout, see ExpertPlacement. T tokens here, W ranks, S rows sent (one per token
/// and destination rank), R rows received, P assignments of this rank's places. Index tensors are int64 on
/// the tokens' device.
struct ExchangePlan {
  int64_t tokens = 0;  ///< T
  int64_t top_k = 0;   ///< assignments that a token may have: to experts in slices one a slice
  std::vector<int64_t> send_rows;            ///< [W] rows to each rank, Σ = S
  std::vector<int64_t> receive_rows;         ///< [W] rows from each rank, Σ = R
  std::vector<int64_t> send_assignments;     ///< [W], Σ = A: T·top_k less those that are none
  std::vector<int64_t> receive_assignments;  ///< [W], Σ = P
  ExpertCounts expert_counts;                ///< of the local experts' assignments, Σ = P

  /// [T, top_k] of a routing from outside: its weights, NaN in tokens that are refused. Undefined
  /// otherwise.
  torch::Tensor checked_weights;
  /// [P] the routing's weights, as dispatch would bring them.
  torch::Tensor local_weights;

  // Of a step whose counts the host does not learn (`Exchange::begin_plan` with a capacity), in which the
  // four lists above are empty, and S, R and P what there is room for. Undefined otherwise.
  torch::Tensor row_counts;         ///< [3, W] rows to each rank, from each, and to each again
  torch::Tensor assignment_counts;  ///< [3, W]
  torch::Tensor spoilt;             ///< [] int64, 1: nothing moves, what comes of it is to be NaN

  // Source side. Sent rows are ordered by (destination, token).
  torch::Tensor source_counts;  ///< [places] assignments of each
  torch::Tensor send_tokens;    ///< [S] token of each sent row
  torch::Tensor token_offsets;  ///< [T+1] into token_rows
  torch::Tensor token_rows;     ///< [S] the sent rows of each token, ascending
  torch::Tensor send_order;     ///< [A] flat (token, slot) of assignments by (place, token)

  // Expert side. Assignments are expert-major: by (expert, source rank, token), which is the order
  // of a single rank holding the ranks' tokens one after another.
  torch::Tensor received_order;   ///< [P] place of each assignment in the order of arrival
  torch::Tensor assignment_rows;  ///< [P] received row of each assignment
  torch::Tensor row_offsets;      ///< [R+1] into row_assignments
  torch::Tensor row_assignments;  ///< [P] assignments of each received row, ascending

  /// Empty: all rows are one chunk. Otherwise rows of each side lie by chunk first, in dispatch (send_tokens,
  /// assignment_rows) by another one than in combine (token_rows, row_offsets, row_assignments).
  std::vector<ExchangeChunk> chunks;

  int64_t rows() const { return row_offsets.size(0) - 1; }         ///< R
  int64_t assignments() const { return assignment_rows.size(0); }  ///< P
};

/// A plan whose counts are on their way to the host.
class PendingPlan {
 public:
  /// Of which nothing is missing.
  explicit PendingPlan(ExchangePlan plan)
      : source_counts_(plan.source_counts), plan_(std::move(plan)) {}
  /// `rest` makes what is missing, and dispatches `rows`, if they are defined, to `received`.
  using Rest = std::function<ExchangePlan(const torch::Tensor& rows, torch::Tensor& received)>;
  /// `any_sums_losses`: whether a rank of the step has said so; null: all do.
  PendingPlan(torch::Tensor source_counts, Rest rest, std::function<bool()> any_sums_losses)
      : source_counts_(std::move(source_counts)),
        rest_(std::move(rest)),
        any_sums_losses_(std::move(any_sums_losses)) {}

  /// [E] assignments of this rank's tokens; where the routing is refused, of no meaning.
  const torch::Tensor& source_counts() const { return source_counts_; }
  /// The host waits for the counts, and the plan is made of them. Collective at the first call, which
  /// throws as `Exchange::plan`.
  const ExchangePlan& get();
  /// Of a plan that is not made, of a rank that sums no losses: whether another rank does. `get` will throw then,
  /// once those that wait for the sum have got it. The host waits for the counts.
  bool any_sums_losses() const { return any_sums_losses_ && any_sums_losses_(); }
  /// Whether `get` has nothing left to do.
  bool is_made() const { return rest_ == nullptr; }
  /// Of a plan that is not made: the same, and `rows` [T, h] set out as soon as the host has the counts, before
  /// the rest is made of them. Returns them at the experts, [R, h], as dispatch would. Collective.
  torch::Tensor dispatch(const torch::Tensor& rows);

 private:
  torch::Tensor make(const torch::Tensor& rows);

  torch::Tensor source_counts_;
  ExchangePlan plan_;
  Rest rest_;  ///< empty when plan_ is made
  std::function<bool()> any_sums_losses_;
};

struct Departures;
class PlacedRouting;
class LateRefusals;
struct RoutingCheck;

/// What travels: rows and, where wanted, one value per assignment.
struct Payload {
  torch::Tensor rows;    ///< [T, h] at the source, [R, h] at the experts
  torch::Tensor values;  ///< [T, top_k] at the source, [P] at the experts; may be undefined
};

/// Moves tokens to the ranks of their experts and back. Each token crosses to a rank once, however
/// many of its experts live there.
class Exchange {
 public:
  /// Experts in blocks.
  Exchange(std::shared_ptr<Communicator> communicator, int64_t num_experts);
  Exchange(std::shared_ptr<Communicator> communicator, ExpertPlacement placement);

  /// The one place where the host learns counts, and waits for the device; unless this rank is
  /// alone, its routing on a GPU and `errors` late. Collective.
  /// Invalid routing (expert ids out of range or twice in a token, a gate that is not finite) on any
  /// rank is an InputError on that rank and a CommunicationError naming it on the others; nothing
  /// else has been exchanged by then. So is a rank whose routing is of another make than rank 0's, with or
  /// without a gate's sums or with weights of another type, or whose `rows`, of which some may be given
  /// that are like those to be dispatched, have another width or type.
  ExchangePlan plan(const Routing& routing, const torch::Tensor& rows = {},
                    Errors errors = Errors::kAtCall) const;
  /// The same up to where the host waits. What the stream is given before `get` runs while it does: work
  /// that needs no counts, and collectives that are alike on all ranks whatever routing they have.
  /// `sums_losses`: whether this rank will sum losses while the counts travel, which all ranks are to do alike.
  /// Those that do not are found out by the host, so with a capacity all do.
  ///
  /// With late errors and a `capacity` > 0 the host does not wait at all: this rank has room for that many
  /// times its own tokens' assignments, as MoEOptions::receive_capacity, and what any rank refuses is heard
  /// late. Throws InputError where the communicator does not read counts on the device.
  PendingPlan begin_plan(const Routing& routing, const torch::Tensor& rows = {},
                         Errors errors = Errors::kAtCall, double capacity = 0,
                         bool sums_losses = true) const;

  /// Source → experts. Collective.
  Payload dispatch(const Payload& tokens, const ExchangePlan& plan) const;
  /// Experts → source, rows of a token summed in fp32 (fp64): the adjoint of dispatch. Collective.
  Payload combine(const Payload& results, const ExchangePlan& plan) const;

  /// A routing's weights [T, top_k] as its plan has assignments, [T, ExchangePlan::top_k]. Differentiable.
  torch::Tensor slot_weights(const torch::Tensor& weights) const;

  /// The same over another placement.
  Exchange with(ExpertPlacement placement) const;

  const ExpertPlacement& placement() const { return placement_; }
  Communicator& communicator() const { return *communicator_; }

 private:
  /// [4 + W] −1, what a rank tells of itself in most steps alike (its form, its room), and a 0 for each rank.
  torch::Tensor constants(const std::array<int64_t, 3>& form_and_room, torch::Device device) const;
  PendingPlan begin_plan_within_room(const Routing& routing, const torch::Tensor& rows,
                                     const RoutingCheck& check, Departures own,
                                     const torch::Tensor& source_counts, double capacity) const;
  Departures departures(const torch::Tensor& ids, bool may_skip) const;
  /// [E] of the places' counts, behind which may be that of none.
  torch::Tensor counts_of_experts(const torch::Tensor& counts) const;

  std::shared_ptr<Communicator> communicator_;
  ExpertPlacement placement_;
  std::shared_ptr<const PlacedRouting> placed_;  ///< null: places are experts
  /// What of its counts a rank tells each other rank; on the device of the last plan.
  mutable torch::Tensor message_layout_;
  /// How this rank takes part in a step, in one number; and on the device of the last plan.
  mutable int64_t form_ = -1;
  mutable torch::Tensor form_on_device_;
  // Of steps whose counts the host does not learn.
  mutable torch::Tensor first_places_;  ///< [W+1] of each rank, on the device of the last plan
  /// Those of the last plan, and on its device.
  mutable std::vector<int64_t> constant_values_;
  mutable torch::Tensor constants_;
  mutable std::shared_ptr<LateRefusals> late_refusals_;  // made by the first late plan
};

}  // namespace anabranch
