#include "exchange/moving.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <utility>

#include "exchange/arrivals.h"
#include "exchange/chunks.h"
#include "kernels/rows.h"
#include "support/stage.h"
#include "support/sum.h"

// Each of the two is the other's adjoint: the same plan read from the other end.

namespace anabranch {
namespace {

/// Rows that travel while somebody waits for them.
class InTurn final : public Pending {
 public:
  InTurn(Communicator& communicator, std::vector<Transfer> transfers)
      : communicator_(communicator), transfers_(std::move(transfers)) {}
  void finish() override {
    const StageTimes::Measured under_way(kUnderWay);
    stage(kExposed, [&] { communicator_.all_to_all_v(transfers_); });
  }

 private:
  Communicator& communicator_;
  std::vector<Transfer> transfers_;
};

/// Rows that have set out.
class Beside final : public Pending {
 public:
  explicit Beside(std::unique_ptr<Pending> rows) : rows_(std::move(rows)) {}
  void finish() override {
    stage(kExposed, [&] { rows_->finish(); });
  }

 private:
  std::unique_ptr<Pending> rows_;
};

std::unique_ptr<Pending> start(Communicator& communicator, std::vector<Transfer> transfers,
                               Travel travel) {
  if (travel == Travel::kInTurn) {
    return std::make_unique<InTurn>(communicator, std::move(transfers));
  }
  return std::make_unique<Beside>(communicator.start_all_to_all_v(std::move(transfers)));
}

/// The next rows of `all`, as many as `of_ranks` says; all of them where the host does not know.
torch::Tensor next_rows(const torch::Tensor& all, const std::vector<int64_t>& of_ranks,
                        int64_t& next) {
  if (of_ranks.empty()) {
    return all;
  }
  const int64_t rows = sum(of_ranks);
  next += rows;
  return all.narrow(0, next - rows, rows);
}

/// [A] by (expert, token) → [T, top_k]; zeros where a slot has no assignment.
torch::Tensor back_to_slots(const torch::Tensor& ordered_values, const ExchangePlan& plan) {
  const int64_t slots = plan.tokens * plan.top_k;
  const bool none =
      plan.send_order.size(0) < slots;  // where the host does not know, they have zeros
  return (none ? at::zeros({slots}, ordered_values.options()) : at::empty_like(ordered_values))
      .scatter_(0, plan.send_order, ordered_values)
      .view({plan.tokens, plan.top_k});
}

}  // namespace

Dispatching::Dispatching(Communicator& communicator, const Payload& tokens,
                         const ExchangePlan& plan, Travel travel)
    : plan_(plan) {
  const torch::NoGradGuard no_grad;
  torch::Tensor values;  // by destination, then by (expert, token)
  if (tokens.values.defined()) {
    values = RowKernels::on(tokens.rows.device())
                 .gather_rows(tokens.values.contiguous().view(-1), plan.send_order);
  }
  if (communicator.size() == 1) {
    received_ = {tokens.rows, values};
    return;
  }
  received_.rows = at::empty({plan.rows(), tokens.rows.size(1)}, tokens.rows.options());
  if (travel == Travel::kBeside) {
    under_way_.emplace(kUnderWay);
  }
  int64_t next_sent = 0;
  int64_t next_received = 0;
  for (const ExchangeChunk& chunk : chunks_of(plan)) {
    std::vector<Transfer> transfers = {
        {tokens.rows, chunk.send_rows, next_rows(received_.rows, chunk.receive_rows, next_received),
         chunk.receive_rows, next_rows(plan.send_tokens, chunk.send_rows, next_sent),
         there(plan.row_counts)}};
    if (values.defined()) {
      arriving_values_ = at::empty({plan.assignments()}, values.options());
      transfers.push_back({std::exchange(values, {}),
                           plan.send_assignments,
                           arriving_values_,
                           plan.receive_assignments,
                           {},
                           there(plan.assignment_counts)});
    }
    chunks_.push_back(start(communicator, std::move(transfers), travel));
  }
}

void Dispatching::wait_for_next() {
  if (next_ == chunks_.size()) {
    return;  // all is there
  }
  const torch::NoGradGuard no_grad;
  chunks_[next_]->finish();
  chunks_[next_++].reset();
  if (next_ == chunks_.size()) {
    under_way_.reset();
  }
  if (arriving_values_.defined()) {
    received_.values = RowKernels::on(arriving_values_.device())
                           .gather_rows(arriving_values_, plan_.received_order);
    arriving_values_.reset();
  }
}

Combining::Combining(Communicator& communicator, const ExchangePlan& plan, Travel travel,
                     torch::Tensor returned)
    : communicator_(communicator),
      plan_(plan),
      travel_(travel),
      chunks_(chunks_of(plan)),
      returned_{std::move(returned), {}} {}

void Combining::send(const Payload& results) {
  const torch::NoGradGuard no_grad;
  if (communicator_.size() == 1) {
    returned_ = results;
    return;
  }
  const ExchangeChunk& chunk = chunks_[pending_.size()];
  if (!returned_.rows.defined()) {
    returned_.rows =
        at::empty({plan_.send_tokens.size(0), results.rows.size(1)}, results.rows.options());
  }
  std::vector<Transfer> transfers = {{results.rows,
                                      chunk.return_rows,
                                      next_rows(returned_.rows, chunk.returned_rows, next_row_),
                                      chunk.returned_rows,
                                      {},
                                      back(plan_.row_counts)}};
  if (results.values.defined()) {
    const auto options = results.values.options();
    const int64_t count = plan_.send_order.size(0);
    returned_.values =
        plan_.spoilt.defined() ? at::zeros({count}, options) : at::empty({count}, options);
    const auto by_arrival =
        at::empty_like(results.values).scatter_(0, plan_.received_order, results.values);
    transfers.push_back({by_arrival,
                         plan_.receive_assignments,
                         returned_.values,
                         plan_.send_assignments,
                         {},
                         back(plan_.assignment_counts)});
  }
  if (travel_ == Travel::kBeside && !under_way_) {
    under_way_.emplace(kUnderWay);
  }
  pending_.push_back(start(communicator_, std::move(transfers), travel_));
}

Payload Combining::finish_unsummed() {
  const torch::NoGradGuard no_grad;
  for (const auto& pending : pending_) {
    pending->finish();
  }
  pending_.clear();
  under_way_.reset();
  return std::exchange(returned_, {});
}

Payload Combining::finish() {
  const torch::NoGradGuard no_grad;
  const Payload returned = finish_unsummed();
  Payload summed = returned;
  if (communicator_.size() > 1) {
    summed.rows = RowKernels::on(returned.rows.device())
                      .sum_rows(returned.rows, {plan_.token_offsets, plan_.token_rows},
                                /*weights=*/{});
  }
  if (returned.values.defined()) {
    summed.values = back_to_slots(returned.values, plan_);
  }
  return summed;
}

}  // namespace anabranch
