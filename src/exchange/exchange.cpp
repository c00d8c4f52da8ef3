#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <anabranch/exchange.h>

#include "kernels/rows.h"
#include "support/check.h"

// Each of the two is the other's adjoint: the same plan read from the other end.

namespace anabranch {
namespace {

void check_payload(const Payload& payload, int64_t rows, at::IntArrayRef values, const char* call) {
  check_input(payload.rows.defined(), call, ": rows are undefined");
  check_input(
      payload.rows.dim() == 2 && payload.rows.size(0) == rows && payload.rows.is_contiguous(), call,
      ": rows are ", payload.rows.sizes(),
      payload.rows.is_contiguous() ? "" : " and not contiguous", ", expected a contiguous [", rows,
      ", h] for this plan");
  check_input(!payload.values.defined() || payload.values.sizes() == values, call,
              ": values must be ", values, " for this plan, not ",
              payload.values.defined() ? payload.values.sizes() : at::IntArrayRef());
}

}  // namespace

Payload Exchange::dispatch(const Payload& tokens, const ExchangePlan& plan) const {
  const torch::NoGradGuard no_grad;
  check_payload(tokens, plan.tokens, {plan.tokens, plan.top_k}, "dispatch");
  const RowKernels& kernels = RowKernels::on(tokens.rows.device());
  const auto by_destination = [&](const torch::Tensor& values) {  // then by (expert, token)
    return kernels.gather_rows(values.contiguous().view(-1), plan.send_order);
  };
  Payload received;
  if (communicator_->size() == 1) {
    received.rows = tokens.rows;
    if (tokens.values.defined()) {
      received.values = by_destination(tokens.values);
    }
    return received;
  }

  received.rows = at::empty({plan.rows(), tokens.rows.size(1)}, tokens.rows.options());
  std::vector<Transfer> transfers = {
      {tokens.rows, plan.send_rows, received.rows, plan.receive_rows, plan.send_tokens}};
  torch::Tensor values;
  if (tokens.values.defined()) {
    values = at::empty({plan.assignments()}, tokens.values.options());
    transfers.push_back(
        {by_destination(tokens.values), plan.send_assignments, values, plan.receive_assignments});
  }
  communicator_->all_to_all_v(transfers);
  if (values.defined()) {
    received.values = kernels.gather_rows(values, plan.received_order);
  }
  return received;
}

Payload Exchange::combine(const Payload& results, const ExchangePlan& plan) const {
  const torch::NoGradGuard no_grad;
  check_payload(results, plan.rows(), {plan.assignments()}, "combine");
  const auto back_to_slots = [&](const torch::Tensor& ordered_values) {
    const int64_t slots = plan.tokens * plan.top_k;
    const bool none = plan.send_order.size(0) < slots;  // slots without an assignment: zeros
    return (none ? at::zeros({slots}, ordered_values.options()) : at::empty_like(ordered_values))
        .scatter_(0, plan.send_order, ordered_values)
        .view({plan.tokens, plan.top_k});
  };
  Payload returned;
  if (communicator_->size() == 1) {
    returned.rows = results.rows;
    if (results.values.defined()) {
      returned.values = back_to_slots(results.values);
    }
    return returned;
  }

  const auto rows =
      at::empty({plan.send_tokens.size(0), results.rows.size(1)}, results.rows.options());
  std::vector<Transfer> transfers = {{results.rows, plan.receive_rows, rows, plan.send_rows}};
  torch::Tensor values;
  if (results.values.defined()) {
    values = at::empty({plan.send_order.size(0)}, results.values.options());
    const auto by_arrival =
        at::empty_like(results.values).scatter_(0, plan.received_order, results.values);
    transfers.push_back({by_arrival, plan.receive_assignments, values, plan.send_assignments});
  }
  communicator_->all_to_all_v(transfers);
  returned.rows = RowKernels::on(rows.device())
                      .sum_rows(rows, {plan.token_offsets, plan.token_rows}, /*weights=*/{});
  if (values.defined()) {
    returned.values = back_to_slots(values);
  }
  return returned;
}

}  // namespace anabranch
