#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <anabranch/exchange.h>

#include "exchange/pieces.h"
#include "kernels/kernels.h"
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

/// The rows for other ranks, from the tokens to where they are sent from.
void gather(const torch::Tensor& tokens, const ExchangePlan& plan, const PieceRows& pieces,
            int rank, const torch::Tensor& sent) {
  const auto ranks = static_cast<int>(plan.send_rows.size());
  for (int to = 0; to < ranks; ++to) {
    if (to != rank && pieces.sent(to).rows > 0) {
      kernels_for(tokens.device())
          .gather_rows_into(pieces.sent(to).of(sent), tokens, pieces.sent(to).of(plan.send_tokens));
    }
  }
}

/// While the first piece travels the others are gathered, and then this rank's own rows. `values` go
/// with the last. → [R, h]
torch::Tensor dispatch_in_pieces(Communicator& communicator, const torch::Tensor& tokens,
                                 const ExchangePlan& plan, std::vector<Transfer> values) {
  const int rank = communicator.rank();
  const auto sent = at::empty({plan.send_tokens.size(0), tokens.size(1)}, tokens.options());
  const auto received = at::empty({plan.rows(), tokens.size(1)}, tokens.options());
  const PieceRows first(plan, 0, 1);
  const PieceRows rest(plan, 1, kPieces);
  SideStream side(tokens.device());

  gather(tokens, plan, first, rank, sent);
  side.run([&] { communicator.all_to_all_v(first.there(rank, sent, received)); });
  gather(tokens, plan, rest, rank, sent);
  side.run([&] {
    auto transfers = rest.there(rank, sent, received);
    std::move(values.begin(), values.end(), std::back_inserter(transfers));
    communicator.all_to_all_v(transfers);
  });
  const PieceRows all(plan, 0, kPieces);
  kernels_for(tokens.device())
      .gather_rows_into(all.received(rank).of(received), tokens,
                        all.sent(rank).of(plan.send_tokens));
  side.join();
  return received;
}

/// out[t] = the sum of the returned rows of token t, for tokens begin .. end − 1.
void sum_tokens(const torch::Tensor& rows, const ExchangePlan& plan, int64_t begin, int64_t end,
                const torch::Tensor& out) {
  kernels_for(rows.device())
      .sum_rows_into(out.narrow(0, begin, end - begin), rows,
                     {plan.token_offsets.narrow(0, begin, end - begin + 1), plan.token_rows},
                     /*weights=*/{});
}

/// While the last piece travels the tokens of the others are summed. `values` go with the last.
/// → [T, h]
torch::Tensor combine_in_pieces(Communicator& communicator, const torch::Tensor& results,
                                const ExchangePlan& plan, std::vector<Transfer> values) {
  const int rank = communicator.rank();
  const auto rows = at::empty({plan.send_tokens.size(0), results.size(1)}, results.options());
  const auto tokens = at::empty({plan.tokens, results.size(1)}, results.options());
  const int64_t last_piece = piece_begins(plan.tokens)[kPieces - 1];
  const PieceRows first(plan, 0, kPieces - 1);
  const PieceRows last(plan, kPieces - 1, kPieces);
  SideStream side(results.device());

  side.run([&] { communicator.all_to_all_v(first.back(rank, results, rows)); });
  const SideStream::Mark first_came = side.mark();
  side.run([&] {
    auto transfers = last.back(rank, results, rows);
    std::move(values.begin(), values.end(), std::back_inserter(transfers));
    communicator.all_to_all_v(transfers);
  });
  const PieceRows all(plan, 0, kPieces);
  all.sent(rank).of(rows).copy_(all.received(rank).of(results));
  side.wait(first_came);
  sum_tokens(rows, plan, 0, last_piece, tokens);
  side.join();
  sum_tokens(rows, plan, last_piece, plan.tokens, tokens);
  return tokens;
}

}  // namespace

bool Exchange::crosses_in_pieces(const torch::Tensor& rows, const ExchangePlan& plan) const {
  return least_bytes_in_pieces_.has_value() &&
         plan.mean_tokens * rows.size(1) * static_cast<int64_t>(rows.element_size()) >=
             *least_bytes_in_pieces_;
}

Payload Exchange::dispatch(const Payload& tokens, const ExchangePlan& plan) const {
  const torch::NoGradGuard no_grad;
  check_payload(tokens, plan.tokens, {plan.tokens, plan.top_k}, "dispatch");
  const Kernels& kernels = kernels_for(tokens.rows.device());
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
  if (crosses_in_pieces(tokens.rows, plan)) {
    received.rows = dispatch_in_pieces(*communicator_, tokens.rows, plan, std::move(transfers));
  } else {
    received.rows = at::empty({plan.rows(), tokens.rows.size(1)}, tokens.rows.options());
    transfers.push_back({kernels.gather_rows(tokens.rows, plan.send_tokens), plan.send_rows,
                         received.rows, plan.receive_rows});
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

  std::vector<Transfer> transfers;
  torch::Tensor values;
  if (results.values.defined()) {
    values = at::empty({plan.send_order.size(0)}, results.values.options());
    const auto by_arrival =
        at::empty_like(results.values).scatter_(0, plan.received_order, results.values);
    transfers.push_back({by_arrival, plan.receive_assignments, values, plan.send_assignments});
  }
  if (crosses_in_pieces(results.rows, plan)) {
    returned.rows = combine_in_pieces(*communicator_, results.rows, plan, std::move(transfers));
  } else {
    const auto rows =
        at::empty({plan.send_tokens.size(0), results.rows.size(1)}, results.rows.options());
    transfers.push_back({results.rows, plan.receive_rows, rows, plan.send_rows});
    communicator_->all_to_all_v(transfers);
    returned.rows = kernels_for(rows.device())
                        .sum_rows(rows, {plan.token_offsets, plan.token_rows}, /*weights=*/{});
  }
  if (values.defined()) {
    returned.values = back_to_slots(values);
  }
  return returned;
}

}  // namespace anabranch
