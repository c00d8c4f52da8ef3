#include "exchange/chunks.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/tensor.h>

#include "communicator/chunks.h"
#include "exchange/arrange.h"
#include "kernels/plan.h"

namespace anabranch {
namespace {

/// [places] on the host: the chunk of each.
torch::Tensor chunk_of_experts(const ExpertPlacement& placement, int64_t chunks) {
  std::vector<int64_t> chunk;
  for (int64_t r = 0; r < placement.num_ranks; ++r) {
    const int64_t local = placement.local_experts(r);
    for (int64_t c = 0; c < chunks; ++c) {
      const auto experts = chunk_length(local, static_cast<int>(c), static_cast<int>(chunks));
      chunk.insert(chunk.end(), experts, c);
    }
  }
  return at::tensor(chunk, at::kLong);
}

/// Rows by the first and by the last chunk of their assignments, which `by_row` names in the order of
/// experts.
struct FirstAndLast {
  FirstAndLast(const Csr& by_row, const torch::Tensor& chunk_of_assignment,
               const torch::Tensor& rank, int64_t chunks, int64_t ranks) {
    const int64_t rows = rank.size(0);
    const auto chunk_of = [&](const torch::Tensor& place) {
      return chunk_of_assignment.index_select(0, by_row.members.index_select(0, place));
    };
    first = arrange(chunk_of(by_row.offsets.narrow(0, 0, rows)), rank, chunks, ranks);
    last = arrange(chunk_of(by_row.offsets.narrow(0, 1, rows) - 1), rank, chunks, ranks);
  }
  Arranged first;
  Arranged last;
};

/// Of the rows that are sent: their assignments lie by (expert, token).
FirstAndLast sent_rows(const ExchangePlan& plan, const torch::Tensor& chunk_of_expert,
                       int64_t chunks, int64_t ranks) {
  const auto options = plan.send_tokens.options();
  const auto rank = rank_of_rows(plan.send_rows, options);
  const Csr by_row =
      PlanKernels::on(options.device()).group(sent_row_of_assignments(plan), rank.size(0));
  const auto chunk_of_assignment =
      repeated(chunk_of_expert.to(options.device()), plan.source_counts, plan.send_order.size(0));
  return {by_row, chunk_of_assignment, rank, chunks, ranks};
}

FirstAndLast received_rows(const ExchangePlan& plan, const torch::Tensor& chunk_of_expert,
                           int64_t chunks, const ExpertPlacement& placement, int64_t own_rank) {
  const auto options = plan.assignment_rows.options();
  const auto own =
      chunk_of_expert.narrow(0, placement.first_place(own_rank), placement.local_experts(own_rank));
  const auto chunk_of_assignment =
      repeated(own, at::tensor(plan.expert_counts.on_host(), at::kLong), plan.assignments());
  return {{plan.row_offsets, plan.row_assignments},
          chunk_of_assignment.to(options.device()),
          rank_of_rows(plan.receive_rows, options),
          chunks,
          placement.num_ranks};
}

}  // namespace

ExchangePlan in_chunks(ExchangePlan plan, int64_t chunks, const ExpertPlacement& placement,
                       int64_t rank) {
  const int64_t ranks = placement.num_ranks;
  if (chunks == 1 || ranks == 1 || plan.row_counts.defined()) {
    return plan;
  }
  const torch::NoGradGuard no_grad;
  const auto chunk_of_expert = chunk_of_experts(placement, chunks);
  const FirstAndLast sent = sent_rows(plan, chunk_of_expert, chunks, ranks);
  const FirstAndLast received = received_rows(plan, chunk_of_expert, chunks, placement, rank);
  const auto counts =
      at::cat({sent.first.counts, received.first.counts, received.last.counts, sent.last.counts})
          .cpu();
  const auto rows = [&, next = counts.const_data_ptr<int64_t>()](int64_t list, int64_t chunk) {
    const auto* begin = next + (list * chunks + chunk) * ranks;
    return std::vector<int64_t>(begin, begin + ranks);
  };
  for (int64_t c = 0; c < chunks; ++c) {
    plan.chunks.push_back({chunk_begin(placement.local_experts(rank), static_cast<int>(c) + 1,
                                       static_cast<int>(chunks)),
                           rows(0, c), rows(1, c), rows(2, c), rows(3, c)});
  }
  const auto back = received.last.place.index_select(0, plan.assignment_rows);
  const Csr by_row = PlanKernels::on(back.device()).group(back, plan.rows());
  plan.send_tokens = plan.send_tokens.index_select(0, sent.first.from);
  plan.token_rows = sent.last.place.index_select(0, plan.token_rows);
  plan.assignment_rows = received.first.place.index_select(0, plan.assignment_rows);
  plan.row_offsets = by_row.offsets;
  plan.row_assignments = by_row.members;
  return plan;
}

std::vector<ExchangeChunk> chunks_of(const ExchangePlan& plan) {
  if (!plan.chunks.empty()) {
    return plan.chunks;
  }
  return {{plan.expert_counts.experts(), plan.send_rows, plan.receive_rows, plan.receive_rows,
           plan.send_rows}};
}

}  // namespace anabranch
