#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/tensor.h>
#include <anabranch/error.h>
#include <anabranch/exchange.h>

#include <algorithm>
#include <array>
#include <limits>
#include <memory>
#include <numeric>
#include <utility>

#include "exchange/arrivals.h"
#include "exchange/bounded_plan.h"
#include "exchange/late_refusals.h"
#include "kernels/plan.h"
#include "kernels/rows.h"
#include "placement/placed_routing.h"
#include "support/cuda/capture.h"
#include "support/check.h"
#include "support/cuda/host_copy.h"
#include "support/stage.h"
#include "support/sum.h"
#include "support/cuda/to_gpu.h"

namespace anabranch {
namespace {

// What every rank tells every other before any row moves: how it takes part in the step, whether its
// routing is valid, the rows it will send there, and the assignments among them of each of the receiver's
// experts. As long as it is whatever the ranks were given, so it comes through where they disagree.
enum Header : int64_t { kNonfiniteToken, kInvalidToken, kForm, kRows, kHeader };

void check_routing(const Routing& routing) {
  const auto& ids = routing.expert_ids;
  const auto& weights = routing.weights;
  check_input(ids.defined() && weights.defined(), "routing: expert_ids and weights must be given");
  check_input(ids.dim() == 2 && ids.scalar_type() == torch::kInt64,
              "routing: expert_ids must be int64 [T, top_k], not ", ids.scalar_type(), " ",
              ids.sizes());
  check_input(ids.size(1) >= 1, "routing: top_k = 0, expected at least 1");
  check_input(weights.sizes() == ids.sizes(), "routing: weights are ", weights.sizes(),
              ", expected the shape of expert_ids, ", ids.sizes());
  check_input(weights.scalar_type() == torch::kFloat32 || weights.scalar_type() == torch::kFloat64,
              "routing: weights are ", weights.scalar_type(), ", expected fp32 or fp64");
  check_input(weights.device() == ids.device(), "routing: expert_ids on ", ids.device(),
              " but weights on ", weights.device());
  check_input(ids.size(0) <= std::numeric_limits<int32_t>::max(), "routing: ", ids.size(0),
              " tokens on one rank, expected fewer than 2^31");
}

/// Of a router's own routing the ids are valid, and it says itself which gate was not finite.
RoutingCheck check_of(const Routing& routing, const torch::Tensor& ids, int64_t num_experts) {
  if (routing.first_nonfinite_token.defined()) {
    return {routing.first_nonfinite_token, {}, {}};
  }
  return PlanKernels::on(ids.device())
      .check_routing(ids, routing.weights.detach().contiguous(), num_experts, routing.may_skip);
}

/// [2 + E] int64: the first tokens that are wrong, and behind them `counts` [E].
torch::Tensor refused_tokens_and(const torch::Tensor& counts, const RoutingCheck& check) {
  const auto& nonfinite = check.first_nonfinite_token;
  const auto& invalid = check.first_invalid_token;
  return at::cat({nonfinite.reshape({1}),
                  invalid.defined() ? invalid.reshape({1}) : at::full({1}, -1, counts.options()),
                  counts});
}

/// The refusal of this rank's own routing.
[[noreturn]] void refuse(const Routing& routing, int64_t num_experts, int64_t nonfinite,
                         int64_t invalid) {
  if (nonfinite >= 0) {
    throw InputError(c10::str("routing: the gate of token ", nonfinite, " holds NaN or Inf"));
  }
  const auto ids = routing.expert_ids[invalid].cpu().contiguous();
  const c10::ArrayRef<int64_t> values(ids.const_data_ptr<int64_t>(), ids.numel());
  throw InputError(c10::str("routing: expert_ids of token ", invalid, " are [",
                            c10::Join(", ", values), "], expected distinct ids from 0 to ",
                            num_experts - 1));
}

/// Of a step, what all ranks must have alike: with it, messages fit each other.
struct Form {
  int64_t width = 0;        ///< of a row that is to be dispatched; 0: none is known
  int64_t type = 0;         ///< of such a row
  int64_t weights = 0;      ///< their type
  int64_t gate_sums = 0;    ///< what the routing brings for the batch's losses, a bit each
  int64_t sums_losses = 0;  ///< 1: the ranks sum them

  static Form of(const Routing& routing, const torch::Tensor& rows, bool sums_losses) {
    Form form;
    form.sums_losses = sums_losses ? 1 : 0;
    if (rows.defined()) {
      form.width = rows.size(-1);
      form.type = static_cast<int64_t>(rows.scalar_type());
    }
    form.weights = static_cast<int64_t>(routing.weights.scalar_type());
    form.gate_sums = (routing.probability_sum.defined() ? 1 : 0) +
                     (routing.first_counts.defined() ? 2 : 0) +
                     (routing.importance.defined() ? 4 : 0);
    return form;
  }
  int64_t number() const {
    return (((width * 256 + type) * 256 + weights) * 8 + gate_sums) * 2 + sums_losses;
  }
  static Form of_number(int64_t number) {
    return {number >> 20, (number >> 12) & 255, (number >> 4) & 255, (number >> 1) & 7, number & 1};
  }

  std::string describe() const {
    const auto name = [](int64_t type) {
      return c10::toString(static_cast<torch::ScalarType>(type));
    };
    return c10::str(width == 0 ? std::string("rows") : c10::str("rows of ", width, " ", name(type)),
                    ", weights of ", name(weights), ", ",
                    gate_sums == 0 ? "a routing from outside" : "a gate's routing",
                    sums_losses == 0 ? " without losses, as in an evaluation" : "");
  }
};

/// Throws on every rank if the ranks do not take part in the same way.
void check_forms(const std::vector<const int64_t*>& headers) {
  std::vector<int> peers;
  std::string text;
  const Form expected = Form::of_number(headers[0][kForm]);
  for (size_t rank = 1; rank < headers.size(); ++rank) {
    if (headers[rank][kForm] != headers[0][kForm]) {
      peers.push_back(static_cast<int>(rank));
      text += c10::str(text.empty() ? "" : "; ", "rank ", rank, " has ",
                       Form::of_number(headers[rank][kForm]).describe(), " where rank 0 has ",
                       expected.describe());
    }
  }
  if (!peers.empty()) {
    throw CommunicationError("the ranks do not agree: " + text, peers);
  }
}

/// Throws on every rank if any rank's header says that its routing is invalid.
void check_peers(const std::vector<const int64_t*>& headers) {
  std::vector<int> peers;
  std::string reasons;
  for (size_t rank = 0; rank < headers.size(); ++rank) {
    const bool nonfinite = headers[rank][kNonfiniteToken] >= 0;
    if (nonfinite || headers[rank][kInvalidToken] >= 0) {
      peers.push_back(static_cast<int>(rank));
      reasons += c10::str(
          reasons.empty() ? "" : "; ", "rank ", rank, " refused its routing: token ",
          headers[rank][nonfinite ? kNonfiniteToken : kInvalidToken],
          nonfinite ? " has NaN or Inf in its gate" : " has expert ids out of range or twice");
    }
  }
  if (!peers.empty()) {
    throw CommunicationError(reasons, peers);
  }
}

/// Places, in [nonfinite, invalid, form, rows of each rank.., counts of each expert..], of what each
/// rank is sent.
torch::Tensor message_layout(const ExpertPlacement& placement) {
  std::vector<int64_t> layout;
  int64_t place = kRows + placement.num_ranks;
  for (int64_t rank = 0; rank < placement.num_ranks; ++rank) {
    layout.insert(layout.end(), {kNonfiniteToken, kInvalidToken, kForm, kRows + rank});
    for (int64_t e = 0; e < placement.local_experts(rank); ++e) layout.push_back(place++);
  }
  return torch::tensor(layout, torch::kInt64);
}

std::vector<int64_t> first_places(const ExpertPlacement& placement) {
  std::vector<int64_t> first;
  for (int64_t rank = 0; rank <= placement.num_ranks; ++rank) {
    first.push_back(placement.first_place(rank));
  }
  return first;
}

/// What this rank told and was told, in rank order.
struct Announced {
  torch::Tensor on_host;             // what the pointers below point into
  std::vector<const int64_t*> to;    // [W] header and the receiver's experts
  std::vector<const int64_t*> from;  // [W] header and this rank's experts
};

/// The counts in host memory: here the host waits for the device, once a step. What a failed
/// collective has left is no count.
torch::Tensor wait_for(const HostCopy& counts, Communicator& communicator) {
  const auto& on_host = counts.wait();
  communicator.check();
  return on_host;
}

/// What this rank tells the others and is told by them, on the device.
struct ToldCounts {
  torch::Tensor all;       ///< the message, and behind it what was received
  torch::Tensor received;  ///< [W, kHeader + local experts]
};

/// One small exchange. Of `numbers` the message is those that `layout` names.
ToldCounts tell(Communicator& communicator, const ExpertPlacement& placement,
                const torch::Tensor& numbers, const torch::Tensor& layout) {
  const int64_t ranks = placement.num_ranks;
  const int64_t width = kHeader + placement.local_experts(communicator.rank());
  std::vector<int64_t> sizes;
  for (int64_t rank = 0; rank < ranks; ++rank) {
    sizes.push_back(kHeader + placement.local_experts(rank));
  }
  const int64_t length = layout.size(0);
  const auto all = at::empty({length + ranks * width}, numbers.options());
  auto message = all.narrow(0, 0, length);
  const auto received = all.narrow(0, length, ranks * width);
  at::index_select_out(message, numbers, 0, layout);
  communicator.all_to_all_v({{message, sizes, received, std::vector<int64_t>(ranks, width)}});
  return {all, received.view({ranks, width})};
}

/// From the message and, behind it, what was received.
Announced announced_in(const torch::Tensor& on_host, const ExpertPlacement& placement,
                       int64_t own_rank) {
  Announced announced;
  announced.on_host = on_host;
  const int64_t width = kHeader + placement.local_experts(own_rank);
  const auto* to = on_host.const_data_ptr<int64_t>();
  const auto* from = to + on_host.numel() - placement.num_ranks * width;
  for (int64_t rank = 0; rank < placement.num_ranks; ++rank) {
    announced.to.push_back(to);
    announced.from.push_back(from);
    to += kHeader + placement.local_experts(rank);
    from += width;
  }
  return announced;
}

/// The counts of a plan.
ExchangePlan plan_counts(const Announced& announced, const ExpertPlacement& placement,
                         int64_t own_rank) {
  const int64_t local = placement.local_experts(own_rank);
  ExchangePlan plan;
  std::vector<int64_t> expert_counts(local, 0);
  for (int64_t rank = 0; rank < placement.num_ranks; ++rank) {
    const int64_t* sent = announced.to[rank] + kHeader;
    const int64_t* received = announced.from[rank] + kHeader;
    plan.send_rows.push_back(announced.to[rank][kRows]);
    plan.receive_rows.push_back(announced.from[rank][kRows]);
    plan.send_assignments.push_back(
        std::accumulate(sent, sent + placement.local_experts(rank), int64_t{0}));
    plan.receive_assignments.push_back(std::accumulate(received, received + local, int64_t{0}));
    std::transform(received, received + local, expert_counts.begin(), expert_counts.begin(),
                   std::plus<>());
  }
  plan.expert_counts = std::move(expert_counts);
  return plan;
}

/// The counts of a rank alone, for which the host waits; the refusal of its routing.
std::vector<int64_t> wait_for_counts(const Routing& routing, const RoutingCheck& check,
                                     const torch::Tensor& expert_counts,
                                     Communicator& communicator) {
  const HostCopy copy(refused_tokens_and(expert_counts, check));
  const auto told = wait_for(copy, communicator);
  const int64_t* own = told.const_data_ptr<int64_t>();
  const int64_t* counts = own + kForm;  // of the rest there is nothing to tell
  if (own[kNonfiniteToken] >= 0 || own[kInvalidToken] >= 0) {
    refuse(routing, expert_counts.size(0), own[kNonfiniteToken], own[kInvalidToken]);
  }
  return {counts, counts + expert_counts.size(0)};
}

/// Of a rank alone: to it arrives all that it sends. With `late` refusals nobody waits. (Ids out of range
/// count as some expert's.)
ExchangePlan plan_alone(const Routing& routing, const torch::Tensor& ids, const RoutingCheck& check,
                        int64_t num_experts, Communicator& communicator, const LateRefusals* late) {
  const LateRefusal refusal{check.first_nonfinite_token, check.first_invalid_token,
                            late != nullptr ? late->told() : torch::Tensor()};
  const auto weights =
      check.weights.defined() ? check.weights : routing.weights.detach().contiguous();
  const LocalPlan local =
      PlanKernels::on(ids.device())
          .plan_local(ids, weights, num_experts, late != nullptr ? &refusal : nullptr);
  ExchangePlan plan;
  plan.tokens = ids.size(0);
  plan.top_k = ids.size(1);
  plan.send_rows = plan.receive_rows = {plan.tokens};
  plan.send_assignments = plan.receive_assignments = {ids.numel()};
  if (late != nullptr) {
    plan.expert_counts = ExpertCounts(local.counts, ids.numel());
  } else {
    plan.expert_counts = wait_for_counts(routing, check, local.expert_counts, communicator);
  }
  plan.source_counts = local.expert_counts;
  plan.send_tokens = plan.token_rows = local.places.narrow(0, 0, plan.tokens);
  plan.token_offsets = local.places.narrow(0, 0, plan.tokens + 1);
  plan.local_weights = local.weights;
  plan.send_order = local.send_order;
  plan.received_order = local.places.narrow(0, 0, ids.numel());
  plan.assignment_rows = local.assignment_rows;
  plan.row_offsets = local.by_row.offsets;
  plan.row_assignments = local.by_row.members;
  return plan;
}

/// Of several ranks: all that is known before the host knows its counts.
struct Beginning {
  Routing routing;
  Departures own;
  HostCopy counts;   ///< the message and what was received
  ArrivalEnds ends;  ///< as the device knows them
};

/// The first numbers of Told, in parts; `constants`: those from kToldInvalid on.
std::vector<torch::Tensor> head(const RoutingCheck& check, const torch::Tensor& constants) {
  std::vector<torch::Tensor> parts = {check.first_nonfinite_token.reshape({1})};
  if (check.first_invalid_token.defined()) {
    parts.push_back(check.first_invalid_token.reshape({1}));
  }
  const auto made = static_cast<int64_t>(parts.size());
  parts.push_back(constants.narrow(0, made - kToldInvalid, kTold - made));
  return parts;
}

/// [T·top_k] the routing's weights in the order in which assignments are sent.
torch::Tensor sent_weights(const torch::Tensor& of_slots, const SendPlan& send) {
  return RowKernels::on(send.send_order.device())
      .gather_rows(of_slots.detach().contiguous().view(-1), send.send_order);
}

/// Whether any rank has said so; the host waits for the counts.
bool losses_are_summed(const Beginning& begun, const ExpertPlacement& placement,
                       Communicator& communicator) {
  const Announced announced =
      announced_in(wait_for(begun.counts, communicator), placement, communicator.rank());
  return std::any_of(announced.from.begin(), announced.from.end(), [](const int64_t* header) {
    return Form::of_number(header[kForm]).sums_losses != 0;
  });
}

ExchangePlan finish_plan(const Beginning& begun, const ExpertPlacement& placement,
                         Communicator& communicator, const torch::Tensor& rows,
                         torch::Tensor& received) {
  const Announced announced =
      announced_in(wait_for(begun.counts, communicator), placement, communicator.rank());
  check_forms(announced.from);
  const int64_t* own = announced.to[0];
  if (own[kNonfiniteToken] >= 0 || own[kInvalidToken] >= 0) {
    refuse(begun.routing, placement.num_experts, own[kNonfiniteToken], own[kInvalidToken]);
  }
  check_peers(announced.from);

  const SendPlan& send = begun.own.send;
  ExchangePlan plan = plan_counts(announced, placement, communicator.rank());
  plan.tokens = begun.own.ids.size(0);
  plan.top_k = begun.own.ids.size(1);
  plan.source_counts = send.expert_counts.narrow(0, 0, placement.num_places());
  plan.send_tokens = send.send_tokens.narrow(0, 0, sum(plan.send_rows));
  plan.token_offsets = send.token_offsets;
  plan.token_rows = send.token_rows.narrow(0, 0, sum(plan.send_rows));
  plan.send_order = send.send_order.narrow(0, 0, sum(plan.send_assignments));
  received = receive_into(plan, begun.own, rows, begun.ends,
                          {sum(plan.receive_rows), sum(plan.receive_assignments)}, communicator);
  return plan;
}

}  // namespace

torch::Tensor PendingPlan::make(const torch::Tensor& rows) {
  const torch::NoGradGuard no_grad;
  const Stage named("anabranch.plan");
  torch::Tensor received;
  plan_ = std::exchange(rest_, nullptr)(rows, received);
  any_sums_losses_ = nullptr;
  return received;
}

const ExchangePlan& PendingPlan::get() {
  if (!is_made()) {
    make({});
  }
  return plan_;
}

torch::Tensor PendingPlan::dispatch(const torch::Tensor& rows) {
  TORCH_INTERNAL_ASSERT(!is_made());
  return make(rows);
}

Exchange::Exchange(std::shared_ptr<Communicator> communicator, int64_t num_experts)
    : Exchange(communicator, ExpertPlacement{num_experts, communicator->size()}) {}

Exchange::Exchange(std::shared_ptr<Communicator> communicator, ExpertPlacement placement)
    : communicator_(std::move(communicator)), placement_(std::move(placement)) {
  check_input(placement_.num_experts >= 1, "exchange: num_experts = ", placement_.num_experts,
              ", expected at least 1");
  check_input(placement_.num_ranks == communicator_->size(), "exchange: a placement over ",
              placement_.num_ranks, " ranks, in a group of ", communicator_->size());
  check_placement(placement_);
  if (!placement_.is_blocks()) {
    placed_ = std::make_shared<const PlacedRouting>(placement_);
  }
  message_layout_ = message_layout(placement_);
  first_places_ = torch::tensor(first_places(placement_), torch::kInt64);
}

Exchange Exchange::with(ExpertPlacement placement) const {
  Exchange other(communicator_, std::move(placement));
  other.late_refusals_ = late_refusals_;
  return other;
}

ExchangePlan Exchange::plan(const Routing& routing, const torch::Tensor& rows,
                            Errors errors) const {
  return begin_plan(routing, rows, errors).get();
}

torch::Tensor Exchange::slot_weights(const torch::Tensor& weights) const {
  return placed_ == nullptr ? weights : placed_->weights(weights);
}

Departures Exchange::departures(const torch::Tensor& ids, bool may_skip) const {
  const auto places = placed_ == nullptr ? ids : placed_->ids(ids, may_skip);
  return {places,
          PlanKernels::on(ids.device())
              .plan_send(places, first_places(placement_),
                         may_skip || (placed_ != nullptr && placed_->may_skip())),
          {}};
}

torch::Tensor Exchange::counts_of_experts(const torch::Tensor& counts) const {
  return placed_ == nullptr ? counts.narrow(0, 0, placement_.num_experts)
                            : placed_->counts_of_experts(counts);
}

torch::Tensor Exchange::constants(const std::array<int64_t, 3>& form_and_room,
                                  torch::Device device) const {
  std::vector<int64_t> values = {-1};
  values.insert(values.end(), form_and_room.begin(), form_and_room.end());
  values.resize(values.size() + placement_.num_ranks, 0);
  if (values == constant_values_ && constants_.device() == device) {
    return constants_;
  }
  auto made = device.is_cuda() ? to_gpu(values, device) : at::tensor(values, torch::kInt64);
  if (!is_captured(device)) {  // a graph's memory holds them in its replays alone
    constant_values_ = std::move(values);
    constants_ = made;
  }
  return made;
}

PendingPlan Exchange::begin_plan_within_room(const Routing& routing, const torch::Tensor& rows,
                                             const RoutingCheck& check, Departures own,
                                             const torch::Tensor& source_counts,
                                             double capacity) const {
  const auto device = own.ids.device();
  check_input(communicator_->reads_counts_on(device), "exchange: a capacity on ", device,
              ", where ", communicator_->name(),
              " does not read counts: it takes ranks that map each other's memory");
  late_refusals_ = LateRefusals::for_device(device, std::move(late_refusals_));
  if (first_places_.device() != device) {
    first_places_ = first_places_.to(device);
  }
  const Room room =
      room_for(capacity, own.ids.size(0), own.ids.size(1), placement_, communicator_->rank());
  const auto told = constants(
      {Form::of(routing, rows, /*sums_losses=*/true).number(), room.rows, room.assignments},
      device);
  return begin_plan_within(room, std::move(own), head(check, told),
                           told.narrow(0, kTold - kToldInvalid, placement_.num_ranks),
                           source_counts, first_places_, placement_, communicator_,
                           *late_refusals_);
}

PendingPlan Exchange::begin_plan(const Routing& routing, const torch::Tensor& rows, Errors errors,
                                 double capacity, bool sums_losses) const {
  const torch::NoGradGuard no_grad;
  const Stage named("anabranch.plan");
  check_routing(routing);
  const auto ids = routing.expert_ids.contiguous();
  if (late_refusals_ != nullptr) {
    late_refusals_->check();
  }
  const RoutingCheck check = check_of(routing, ids, placement_.num_experts);
  if (communicator_->size() == 1 && !routing.may_skip && placed_ == nullptr) {
    const bool late = errors == Errors::kLate && ids.is_cuda();
    if (late) {
      late_refusals_ = LateRefusals::for_device(ids.device(), std::move(late_refusals_));
    }
    auto plan = plan_alone(routing, ids, check, placement_.num_experts, *communicator_,
                           late ? late_refusals_.get() : nullptr);
    plan.checked_weights = check.weights;
    return PendingPlan(std::move(plan));
  }
  Departures own = departures(ids, routing.may_skip);
  const SendPlan& send = own.send;
  const auto source_counts = counts_of_experts(send.expert_counts);
  if (communicator_->size() > 1 && errors == Errors::kLate && capacity > 0) {
    check_input(sums_losses,
                "exchange: a capacity without losses: nobody would hear of ranks that have some");
    own.weights = sent_weights(slot_weights(routing.weights), send);
    return begin_plan_within_room(routing, rows, check, std::move(own), source_counts, capacity);
  }
  if (message_layout_.device() != ids.device()) {
    message_layout_ = message_layout_.to(ids.device());
  }
  const int64_t form = Form::of(routing, rows, sums_losses).number();
  if (form != form_ || form_on_device_.device() != ids.device()) {
    form_ = form;
    form_on_device_ = at::full({2}, -1, ids.options());  // behind a token of which there is none
    form_on_device_[1] = form;
  }
  const auto& invalid = check.first_invalid_token;
  const auto numbers =
      invalid.defined()
          ? at::cat({check.first_nonfinite_token.reshape({1}), invalid.reshape({1}),
                     form_on_device_.narrow(0, 1, 1), send.rank_rows, send.expert_counts})
          : at::cat({check.first_nonfinite_token.reshape({1}), form_on_device_, send.rank_rows,
                     send.expert_counts});
  const auto [all, received] = tell(*communicator_, placement_, numbers, message_layout_);
  HostCopy counts(all);
  const auto ends = ArrivalEnds::of(received.select(1, kRows),
                                    received.narrow(1, kHeader, received.size(1) - kHeader));
  own.weights = sent_weights(slot_weights(routing.weights), send);
  const auto begun = std::make_shared<const Beginning>(
      Beginning{routing, std::move(own), std::move(counts), ends});
  return {source_counts,
          [begun, placement = placement_, communicator = communicator_](const torch::Tensor& rows,
                                                                        torch::Tensor& received) {
            return finish_plan(*begun, placement, *communicator, rows, received);
          },
          [begun, placement = placement_, communicator = communicator_] {
            return losses_are_summed(*begun, placement, *communicator);
          }};
}

}  // namespace anabranch
