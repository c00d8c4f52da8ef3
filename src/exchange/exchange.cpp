#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <anabranch/exchange.h>

#include <numeric>

#include "kernels/rows.h"
#include "support/check.h"
#include "support/side_stream.h"

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

/// Rows of every other rank from `send` to `receive`, as one transfer for each distance between ranks:
/// it goes to one rank and comes from one.
std::vector<Transfer> transfers_of_others(int rank, const torch::Tensor& send,
                                          const std::vector<int64_t>& send_rows,
                                          const torch::Tensor& receive,
                                          const std::vector<int64_t>& receive_rows) {
  const auto ranks = static_cast<int>(send_rows.size());
  const auto outgoing = send.split_with_sizes(send_rows);
  const auto incoming = receive.split_with_sizes(receive_rows);
  std::vector<Transfer> transfers;
  for (int distance = 1; distance < ranks; ++distance) {
    const int to = (rank + distance) % ranks;
    const int from = (rank + ranks - distance) % ranks;
    transfers.push_back({outgoing[to], std::vector<int64_t>(ranks, 0), incoming[from],
                         std::vector<int64_t>(ranks, 0)});
    transfers.back().send_rows[to] = send_rows[to];
    transfers.back().receive_rows[from] = receive_rows[from];
  }
  return transfers;
}

/// With more ranks a rank's own part is small.
constexpr int kFewRanks = 8;

/// Dispatch of `tokens` [T, h] and of what `values` holds, where a collective runs on a stream: while
/// others' rows travel, this rank's own are gathered to where they are to be. → [R, h]
torch::Tensor dispatch_beside_own(Communicator& communicator, const torch::Tensor& tokens,
                                  const ExchangePlan& plan, std::vector<Transfer> values) {
  const int rank = communicator.rank();
  const RowKernels& kernels = RowKernels::on(tokens.device());
  const auto sent = at::empty({plan.send_tokens.size(0), tokens.size(1)}, tokens.options());
  const auto received = at::empty({plan.rows(), tokens.size(1)}, tokens.options());
  const auto& rows = plan.send_rows;
  const int64_t own = std::accumulate(rows.begin(), rows.begin() + rank, int64_t{0});
  const int64_t behind = own + rows[rank];
  const auto gather = [&](const torch::Tensor& target, int64_t begin, int64_t end) {
    kernels.gather_rows_into(target, tokens, plan.send_tokens.slice(0, begin, end));
  };

  SideStream beside(tokens.device());
  gather(sent.slice(0, 0, own), 0, own);
  gather(sent.slice(0, behind), behind, sent.size(0));
  auto transfers = transfers_of_others(rank, sent, plan.send_rows, received, plan.receive_rows);
  std::move(values.begin(), values.end(), std::back_inserter(transfers));
  communicator.all_to_all_v(transfers);
  beside.run([&] { gather(received.split_with_sizes(plan.receive_rows)[rank], own, behind); });
  beside.join();
  return received;
}

}  // namespace

Payload Exchange::dispatch(const Payload& tokens, const ExchangePlan& plan) const {
  const torch::NoGradGuard no_grad;
  check_payload(tokens, plan.tokens, {plan.tokens, plan.top_k}, "dispatch");
  const RowKernels& kernels = RowKernels::on(tokens.rows.device());
  torch::Tensor ordered_values;  // by (destination, expert, token)
  if (tokens.values.defined()) {
    ordered_values = kernels.gather_rows(tokens.values.contiguous().view(-1), plan.send_order);
  }
  if (communicator_->size() == 1) {
    return {tokens.rows, ordered_values};
  }

  Payload received;
  std::vector<Transfer> transfers;
  torch::Tensor arrived_values;
  if (ordered_values.defined()) {
    arrived_values = at::empty({plan.assignments()}, ordered_values.options());
    transfers.push_back(
        {ordered_values, plan.send_assignments, arrived_values, plan.receive_assignments});
  }
  const bool gathers = communicator_->gathers_rows() && tokens.rows.is_cuda();
  if (!gathers && communicator_->runs_on_stream() && tokens.rows.is_cuda() &&
      communicator_->size() <= kFewRanks) {
    received.rows = dispatch_beside_own(*communicator_, tokens.rows, plan, std::move(transfers));
  } else {
    received.rows = at::empty({plan.rows(), tokens.rows.size(1)}, tokens.rows.options());
    transfers.push_back({gathers ? tokens.rows : kernels.gather_rows(tokens.rows, plan.send_tokens),
                         plan.send_rows, received.rows, plan.receive_rows,
                         gathers ? plan.send_tokens : torch::Tensor()});
    communicator_->all_to_all_v(transfers);
  }
  if (arrived_values.defined()) {
    received.values = kernels.gather_rows(arrived_values, plan.received_order);
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
