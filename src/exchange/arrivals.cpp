#include "exchange/arrivals.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "kernels/rows.h"
#include "support/stage.h"

namespace anabranch {
namespace {

struct Arrived {
  torch::Tensor segment_rows;  ///< [P] int32
  torch::Tensor weights;       ///< [P] in the same order
  torch::Tensor rows;          ///< [R, h], or undefined
};

Arrived exchange(const ExchangePlan& plan, const Departures& own, const torch::Tensor& rows,
                 const Room& room, Communicator& communicator) {
  const auto sent = [&](const torch::Tensor& of_assignments) {
    // All of them, unless there were none among the expert ids.
    return of_assignments.narrow(0, 0, plan.send_order.size(0));
  };
  Arrived arrived{sent(own.send.segment_rows), sent(own.weights), rows};
  if (communicator.size() == 1) {
    return arrived;
  }
  std::vector<Transfer> transfers;
  for (auto* tensor : {&arrived.segment_rows, &arrived.weights}) {
    auto to_send = std::exchange(*tensor, at::empty({room.assignments}, tensor->options()));
    transfers.push_back({std::move(to_send),
                         plan.send_assignments,
                         *tensor,
                         plan.receive_assignments,
                         {},
                         there(plan.assignment_counts)});
  }
  if (rows.defined()) {
    arrived.rows = at::empty({room.rows, rows.size(1)}, rows.options());
    transfers.push_back({rows, plan.send_rows, arrived.rows, plan.receive_rows, plan.send_tokens,
                         there(plan.row_counts)});
  }
  const StageTimes::Measured under_way(kUnderWay);
  stage(kExposed, [&] { communicator.all_to_all_v(transfers); });
  return arrived;
}

}  // namespace

torch::Tensor there(const torch::Tensor& counts) {
  return counts.defined() ? counts.narrow(0, 0, 2) : counts;
}
torch::Tensor back(const torch::Tensor& counts) {
  return counts.defined() ? counts.narrow(0, 1, 2) : counts;
}

torch::Tensor receive_into(ExchangePlan& plan, const Departures& own, const torch::Tensor& rows,
                           const ArrivalEnds& ends, const Room& room, Communicator& communicator) {
  const auto arrived = exchange(plan, own, rows, room, communicator);
  const PlanKernels& kernels = PlanKernels::on(own.ids.device());
  const bool bounded = plan.row_counts.defined();
  // What there is room for but did not come belongs to a row behind all others.
  const auto order =
      kernels.order_arrivals(arrived.segment_rows, ends, /*none=*/bounded ? room.rows : -1);
  const Csr by_row = kernels.group(order.assignment_rows, room.rows + (bounded ? 1 : 0));
  plan.received_order = order.received_order;
  plan.assignment_rows = order.assignment_rows;
  plan.row_offsets = by_row.offsets;
  plan.row_assignments = by_row.members;
  if (bounded) {
    plan.assignment_rows = plan.assignment_rows.clamp_max(std::max<int64_t>(0, room.rows - 1));
    plan.row_offsets = plan.row_offsets.narrow(0, 0, room.rows + 1);
  }
  plan.local_weights =
      RowKernels::on(own.ids.device()).gather_rows(arrived.weights, order.received_order);
  return arrived.rows;
}

}  // namespace anabranch
