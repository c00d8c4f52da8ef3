#include "exchange/chunks.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "communicator/chunks.h"
#include "exchange/arrange.h"
#include "kernels/plan.h"
#include "support/numbers_on.h"

namespace anabranch {
namespace {

/// The part of 0..elements−1, cut into `parts`, that an element is in.
int64_t part_of(int64_t element, int64_t elements, int64_t parts) {
  int part = 0;
  while (chunk_begin(elements, part + 1, static_cast<int>(parts)) <= element) {
    ++part;
  }
  return part;
}

/// In which chunks a rank receives what, by its experts and where that comes from.
class ChunksOfRank {
 public:
  ChunksOfRank(const ExpertPlacement& placement, int64_t rank, int64_t chunks)
      : ranks_(placement.num_ranks),
        experts_(placement.local_experts(rank)),
        blocks_(std::clamp<int64_t>(chunks / std::max<int64_t>(experts_, 1), 1, ranks_)),
        own_block_(part_of(rank, ranks_, blocks_)),
        chunks_(chunks) {}

  /// Behind `chunks`, of each of its experts: that of the assignments from each of so many ranks.
  void append_to(std::vector<int64_t>& chunks, int64_t first_source, int64_t sources) const {
    for (int64_t expert = 0; expert < experts_; ++expert) {
      for (int64_t source = first_source; source < first_source + sources; ++source) {
        chunks.push_back(chunk_of(expert, source));
      }
    }
  }

 private:
  int64_t chunk_of(int64_t expert, int64_t source) const {
    const int64_t turn = (part_of(source, ranks_, blocks_) - own_block_ + blocks_) % blocks_;
    return part_of(expert * blocks_ + turn, experts_ * blocks_, chunks_);
  }

  int64_t ranks_;
  int64_t experts_;
  int64_t blocks_;  ///< of ranks, whose rows for an expert come apart
  int64_t own_block_;
  int64_t chunks_;
};

/// [places] The chunk in which each receives what `source` sends.
std::vector<int64_t> chunk_of_places(const ExpertPlacement& placement, int64_t chunks,
                                     int64_t source) {
  std::vector<int64_t> chunk;
  for (int64_t rank = 0; rank < placement.num_ranks; ++rank) {
    ChunksOfRank(placement, rank, chunks).append_to(chunk, source, 1);
  }
  return chunk;
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
FirstAndLast sent_rows(const ExchangePlan& plan, int64_t chunks, const ExpertPlacement& placement,
                       int64_t own_rank) {
  const auto options = plan.send_tokens.options();
  const auto rank = rank_of_rows(plan.send_rows, options);
  const Csr by_row =
      PlanKernels::on(options.device()).group(sent_row_of_assignments(plan), rank.size(0));
  const auto chunk_of_assignment =
      repeated(numbers_on(options.device(), chunk_of_places(placement, chunks, own_rank)),
               plan.source_counts, plan.send_order.size(0));
  return {by_row, chunk_of_assignment, rank, chunks, placement.num_ranks};
}

/// [P] of the received assignments, on their device.
torch::Tensor chunk_of_assignments(const ExchangePlan& plan, int64_t chunks,
                                   const ExpertPlacement& placement, int64_t own_rank) {
  const auto options = plan.assignment_rows.options();
  const auto source =
      rank_of_rows(plan.receive_rows, options).index_select(0, plan.assignment_rows);
  const auto expert =
      repeated(at::arange(placement.local_experts(own_rank), options),
               numbers_on(options.device(), plan.expert_counts.on_host()), plan.assignments());
  std::vector<int64_t> chunk;  // [local experts · W]
  ChunksOfRank(placement, own_rank, chunks).append_to(chunk, 0, placement.num_ranks);
  return numbers_on(options.device(), chunk).index_select(0, expert * placement.num_ranks + source);
}

/// [2 · chunks] the first assignment of each chunk, and how many it has: they lie side by side.
torch::Tensor first_and_count(const torch::Tensor& chunk_of_assignment, int64_t chunks) {
  const auto options = chunk_of_assignment.options();
  const int64_t assignments = chunk_of_assignment.size(0);
  const auto first = at::full({chunks}, assignments, options)
                         .scatter_reduce_(0, chunk_of_assignment, at::arange(assignments, options),
                                          "amin", /*include_self=*/true);
  const auto count = at::zeros({chunks}, options)
                         .scatter_add_(0, chunk_of_assignment, at::ones_like(chunk_of_assignment));
  return at::cat({first, count});
}

}  // namespace

ExchangePlan in_chunks(ExchangePlan plan, int64_t chunks, const ExpertPlacement& placement,
                       int64_t rank) {
  const int64_t ranks = placement.num_ranks;
  if (chunks == 1 || ranks == 1 || plan.row_counts.defined()) {
    return plan;
  }
  const torch::NoGradGuard no_grad;
  const FirstAndLast sent = sent_rows(plan, chunks, placement, rank);
  const auto chunk_of_assignment = chunk_of_assignments(plan, chunks, placement, rank);
  const FirstAndLast received({plan.row_offsets, plan.row_assignments}, chunk_of_assignment,
                              rank_of_rows(plan.receive_rows, chunk_of_assignment.options()),
                              chunks, ranks);
  const auto counts = at::cat({sent.first.counts, received.first.counts, received.last.counts,
                               sent.last.counts, first_and_count(chunk_of_assignment, chunks)})
                          .cpu();
  const auto* numbers = counts.const_data_ptr<int64_t>();
  const auto rows = [&](int64_t list, int64_t chunk) {
    const auto* begin = numbers + (list * chunks + chunk) * ranks;
    return std::vector<int64_t>(begin, begin + ranks);
  };
  const auto* assignments = numbers + 4 * chunks * ranks;
  for (int64_t c = 0; c < chunks; ++c) {
    plan.chunks.push_back(
        {assignments[c], assignments[chunks + c], rows(0, c), rows(1, c), rows(2, c), rows(3, c)});
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
  return {{0, plan.expert_counts.rows(), plan.send_rows, plan.receive_rows, plan.receive_rows,
           plan.send_rows}};
}

}  // namespace anabranch
