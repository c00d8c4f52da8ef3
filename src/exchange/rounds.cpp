#include "exchange/rounds.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>

#include <algorithm>
#include <numeric>

#include "communicator/chunks.h"
#include "exchange/arrange.h"
#include "kernels/plan.h"
#include "support/sum.h"

namespace anabranch {
namespace {

/// The most of `rows` [W] that may come at once when each rank's share of them is sent in every round.
int64_t most_at_once(const std::vector<int64_t>& rows, int64_t rounds) {
  return std::accumulate(rows.begin(), rows.end(), int64_t{0}, [&](int64_t most, int64_t of_rank) {
    return most + (of_rank + rounds - 1) / rounds;
  });
}

/// [Σ rows]: the round of each row, where rows lie by (rank, token).
torch::Tensor round_of_rows(const std::vector<int64_t>& rows, int64_t rounds,
                            const torch::TensorOptions& options) {
  std::vector<int64_t> shares;
  for (const int64_t of_rank : rows) {
    for (int64_t round = 0; round < rounds; ++round) {
      shares.push_back(chunk_length(of_rank, static_cast<int>(round), static_cast<int>(rounds)));
    }
  }
  return rank_of_rows(shares, options).remainder_(rounds);
}

Arranged arrange_rows(const std::vector<int64_t>& rows, const torch::Tensor& round,
                      int64_t rounds) {
  return arrange(round, rank_of_rows(rows, round.options()), rounds,
                 static_cast<int64_t>(rows.size()));
}

/// The assignments that arrive: expert-major as the plan has them, and in the order in which they come.
struct Arriving {
  Arriving(const ExchangePlan& plan, const torch::Tensor& round_of_row, int64_t rounds) {
    const auto options = plan.assignment_rows.options();
    const auto round = round_of_row.index_select(0, plan.assignment_rows);
    const auto& counts = plan.expert_counts.on_host();
    by_expert = arrange(round, rank_of_rows(counts, options), rounds, plan.expert_counts.experts());
    auto round_by_arrival = at::empty_like(round).scatter_(0, plan.received_order, round);
    by_arrival = arrange_rows(plan.receive_assignments, round_by_arrival, rounds);
  }
  Arranged by_expert;
  Arranged by_arrival;
};

/// What has been counted of all rounds, brought to the host at once.
class Counts {
 public:
  /// `counts`: each [rounds · n], of some n.
  Counts(const std::vector<torch::Tensor>& counts, int64_t rounds)
      : counts_(at::cat(counts).cpu()), rounds_(rounds) {
    for (const auto& each : counts) sizes_.push_back(each.size(0));
  }
  /// [n] of the given of them.
  std::vector<int64_t> of(int64_t round, size_t which) const {
    const auto first = std::accumulate(sizes_.begin(), sizes_.begin() + which, int64_t{0});
    const int64_t count = sizes_[which] / rounds_;
    const auto* begin = counts_.const_data_ptr<int64_t>() + first + round * count;
    return {begin, begin + count};
  }

 private:
  torch::Tensor counts_;
  std::vector<int64_t> sizes_;
  int64_t rounds_;
};

/// Takes of what lies by round the next round's share.
class Shares {
 public:
  explicit Shares(torch::Tensor all) : all_(std::move(all)) {}
  torch::Tensor next(int64_t count) {
    begin_ = end_;
    end_ += count;
    return all_.narrow(0, begin_, count);
  }
  /// Of the share that was taken last.
  int64_t begin() const { return begin_; }

 private:
  torch::Tensor all_;
  int64_t begin_ = 0;
  int64_t end_ = 0;
};

/// A plan on its way into rounds.
class Sharing {
 public:
  Sharing(const ExchangePlan& plan, int64_t rounds)
      : plan_(plan),
        sent_(arrange_rows(plan.send_rows, sent_round(rounds), rounds)),
        departing_(arrange_rows(plan.send_assignments,
                                sent_round(rounds).index_select(0, sent_row_of_assignments(plan)),
                                rounds)),
        received_(arrange_rows(plan.receive_rows, received_round(rounds), rounds)),
        arriving_(plan, received_round(rounds), rounds),
        counts_({sent_.counts, received_.counts, departing_.counts, arriving_.by_arrival.counts,
                 arriving_.by_expert.counts},
                rounds),
        send_tokens_(plan.send_tokens.index_select(0, sent_.from)),
        send_order_(plan.send_order.index_select(0, departing_.from)),
        received_order_(arriving_.by_arrival.place.index_select(0, arrived(plan.received_order))),
        assignment_rows_(received_.place.index_select(0, arrived(plan.assignment_rows))),
        local_weights_(arrived(plan.local_weights)) {}

  /// The next round.
  ExchangePlan next() {
    ExchangePlan part;
    part.tokens = plan_.tokens;
    part.top_k = plan_.top_k;
    part.source_counts = plan_.source_counts;
    part.send_rows = counts_.of(round_, 0);
    part.receive_rows = counts_.of(round_, 1);
    part.send_assignments = counts_.of(round_, 2);
    part.receive_assignments = counts_.of(round_, 3);
    part.expert_counts = counts_.of(round_, 4);
    part.send_tokens = send_tokens_.next(sum(part.send_rows));
    part.send_order = send_order_.next(sum(part.send_assignments));
    const int64_t assignments = part.expert_counts.rows();
    part.received_order = received_order_.next(assignments);
    part.received_order = part.received_order - received_order_.begin();
    part.assignment_rows = assignment_rows_.next(assignments) - first_row_;
    part.local_weights = local_weights_.next(assignments);
    const int64_t rows = sum(part.receive_rows);
    const Csr by_row =
        PlanKernels::on(plan_.send_tokens.device()).group(part.assignment_rows, rows);
    part.row_offsets = by_row.offsets;
    part.row_assignments = by_row.members;
    first_row_ += rows;
    ++round_;
    return part;
  }
  Csr rows_of_tokens() const {
    return {plan_.token_offsets, sent_.place.index_select(0, plan_.token_rows)};
  }

 private:
  torch::Tensor sent_round(int64_t rounds) const {
    return round_of_rows(plan_.send_rows, rounds, plan_.send_tokens.options());
  }
  torch::Tensor received_round(int64_t rounds) const {
    return round_of_rows(plan_.receive_rows, rounds, plan_.send_tokens.options());
  }
  torch::Tensor arrived(const torch::Tensor& of_assignments) const {
    return of_assignments.index_select(0, arriving_.by_expert.from);
  }

  const ExchangePlan& plan_;
  Arranged sent_;       ///< rows
  Arranged departing_;  ///< their assignments, in send_order
  Arranged received_;   ///< rows
  Arriving arriving_;   ///< their assignments
  Counts counts_;
  Shares send_tokens_, send_order_, received_order_, assignment_rows_, local_weights_;
  int64_t round_ = 0;
  int64_t first_row_ = 0;
};

}  // namespace

int64_t count_rounds(const ExchangePlan& plan, int64_t limit, Communicator& communicator) {
  if (limit == 0 || communicator.size() == 1) {
    return 1;
  }
  int64_t rounds = std::max<int64_t>(1, (sum(plan.receive_rows) + limit - 1) / limit);
  while (most_at_once(plan.receive_rows, rounds) > limit) {
    ++rounds;
  }
  const auto of_ranks = communicator.all_gather(at::full({}, rounds, plan.send_tokens.options()));
  return of_ranks.max().item<int64_t>();
}

Rounds in_rounds(const ExchangePlan& plan, int64_t rounds) {
  if (rounds == 1) {
    return {{plan}, {plan.token_offsets, plan.token_rows}};
  }
  const torch::NoGradGuard no_grad;
  Sharing sharing(plan, rounds);
  Rounds result;
  for (int64_t round = 0; round < rounds; ++round) {
    result.plans.push_back(sharing.next());
  }
  result.rows_of_tokens = sharing.rows_of_tokens();
  return result;
}

}  // namespace anabranch
