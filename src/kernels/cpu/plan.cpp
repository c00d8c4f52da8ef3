#include <ATen/Dispatch.h>
#include <cmath>
#include <limits>
#include <numeric>

#include "kernels/plan.h"

namespace anabranch {
namespace {

std::vector<int64_t> rank_of_expert(const std::vector<int64_t>& first_expert) {
  std::vector<int64_t> rank_of(first_expert.back());
  for (size_t rank = 0; rank + 1 < first_expert.size(); ++rank) {
    std::fill(rank_of.begin() + first_expert[rank], rank_of.begin() + first_expert[rank + 1],
              static_cast<int64_t>(rank));
  }
  return rank_of;
}

/// Turns counts into the offsets of a running sum: {a, b, c} → {0, a, a+b, a+b+c}.
std::vector<int64_t> offsets_of(const int64_t* counts, int64_t size) {
  std::vector<int64_t> offsets(size + 1, 0);
  std::partial_sum(counts, counts + size, offsets.begin() + 1);
  return offsets;
}

/// Groups positions 0..count−1 by `group_of(position)`, in [0, groups).
template <typename GroupOf>
Csr grouped(int64_t count, int64_t groups, const torch::TensorOptions& index,
            const GroupOf& group_of) {
  Csr result{at::empty({groups + 1}, index), at::empty({count}, index)};
  int64_t* offsets = result.offsets.data_ptr<int64_t>();
  int64_t* members = result.members.data_ptr<int64_t>();
  std::fill_n(offsets, groups + 1, 0);
  for (int64_t i = 0; i < count; ++i) {
    ++offsets[group_of(i) + 1];
  }
  std::partial_sum(offsets, offsets + groups + 1, offsets);
  std::vector<int64_t> next(offsets, offsets + groups);
  for (int64_t i = 0; i < count; ++i) {
    members[next[group_of(i)]++] = i;
  }
  return result;
}

/// [count] int64, of which number i is `value(i)`.
template <typename Value>
torch::Tensor filled(int64_t count, const torch::TensorOptions& index, const Value& value) {
  torch::Tensor numbers = at::empty({count}, index);
  auto* number = numbers.data_ptr<int64_t>();
  for (int64_t i = 0; i < count; ++i) {
    number[i] = value(i);
  }
  return numbers;
}

/// [groups] how many members each has.
torch::Tensor sizes_of(const Csr& groups) {
  const auto* offsets = groups.offsets.const_data_ptr<int64_t>();
  return filled(groups.offsets.size(0) - 1, groups.offsets.options(),
                [&](int64_t i) { return offsets[i + 1] - offsets[i]; });
}

/// [numbers] their places by falling value, ties in their order.
torch::Tensor largest_first(const torch::Tensor& numbers) {
  const auto* number = numbers.const_data_ptr<int64_t>();
  auto places = filled(numbers.size(0), numbers.options(), [](int64_t i) { return i; });
  auto* first = places.data_ptr<int64_t>();
  std::stable_sort(first, first + numbers.size(0),
                   [&](int64_t a, int64_t b) { return number[a] > number[b]; });
  return places;
}

/// Which (token, rank) pairs exist, found token by token in the order of ranks.
struct TokenRanks {
  std::vector<int64_t> ranks;           // [S] by (token, rank)
  std::vector<int64_t> rows;            // [S] row of each within its rank's segment
  std::vector<int64_t> assignment_row;  // [T·k] the same, for each (token, slot)
};

TokenRanks find_token_ranks(const torch::Tensor& expert_ids, const std::vector<int64_t>& rank_of,
                            int64_t* rank_rows, int64_t ranks, int64_t* token_offsets) {
  const int64_t tokens = expert_ids.size(0);
  const int64_t top_k = expert_ids.size(1);
  const int64_t* ids = expert_ids.const_data_ptr<int64_t>();
  TokenRanks found;
  found.assignment_row.resize(tokens * top_k);
  found.ranks.reserve(tokens * std::min(top_k, ranks));
  found.rows.reserve(tokens * std::min(top_k, ranks));
  std::vector<int64_t> row_at(ranks, -1);
  token_offsets[0] = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    const auto start = static_cast<int64_t>(found.ranks.size());
    for (int64_t slot = 0; slot < top_k; ++slot) {
      const int64_t id = ids[t * top_k + slot];
      if (id < 0 && ranks > 1) {
        found.assignment_row[t * top_k + slot] = 0;
        continue;
      }
      const int64_t rank = id < 0 ? 0 : rank_of[id];  // one rank has every token as a row
      if (row_at[rank] < 0) {
        row_at[rank] = rank_rows[rank]++;
        found.ranks.push_back(rank);
      }
      found.assignment_row[t * top_k + slot] = row_at[rank];
    }
    std::sort(found.ranks.begin() + start, found.ranks.end());
    for (auto rank = found.ranks.begin() + start; rank != found.ranks.end(); ++rank) {
      found.rows.push_back(row_at[*rank]);
      row_at[*rank] = -1;
    }
    token_offsets[t + 1] = static_cast<int64_t>(found.ranks.size());
  }
  return found;
}

/// What ranks have told, as the numbers of Told and of SendPlan lie.
struct Hearing {
  Hearing(const torch::Tensor& told, const torch::Tensor& first)
      : ranks(told.size(0)),
        width(told.size(1)),
        numbers(told.const_data_ptr<int64_t>()),
        first_expert(first.const_data_ptr<int64_t>()) {}

  int64_t ranks;
  int64_t width;
  const int64_t* numbers;
  const int64_t* first_expert;

  const int64_t* of(int64_t rank) const { return numbers + rank * width; }
  int64_t rows(int64_t source, int64_t target) const { return of(source)[kTold + target]; }
  int64_t assignments(int64_t source, int64_t target) const {
    const int64_t* counts = of(source) + kTold + ranks;
    return std::accumulate(counts + first_expert[target], counts + first_expert[target + 1],
                           int64_t{0});
  }

  bool is_sound() const {
    for (int64_t rank = 0; rank < ranks; ++rank) {
      if (!std::all_of(of(rank) + kToldRoomRows, of(rank) + width, [](int64_t number) {
            return number >= 0 && number <= std::numeric_limits<int32_t>::max();
          })) {
        return false;
      }
    }
    return true;
  }
  bool exceeds_a_room() const {
    for (int64_t target = 0; target < ranks; ++target) {
      int64_t all_rows = 0;
      int64_t all_assignments = 0;
      for (int64_t source = 0; source < ranks; ++source) {
        all_rows += rows(source, target);
        all_assignments += assignments(source, target);
      }
      if (all_rows > of(target)[kToldRoomRows] ||
          all_assignments > of(target)[kToldRoomAssignments]) {
        return true;
      }
    }
    return false;
  }
  /// `ranks` where none refuses.
  int64_t first_refusing() const {
    int64_t rank = 0;
    while (rank < ranks && of(rank)[kToldNonfinite] < 0 && of(rank)[kToldInvalid] < 0 &&
           of(rank)[kToldForm] == of(0)[kToldForm]) {
      ++rank;
    }
    return rank;
  }
};

class CpuPlanKernels final : public PlanKernels {
 public:
  RoutingCheck check_routing(const torch::Tensor& expert_ids, const torch::Tensor& weights,
                             int64_t num_experts, bool may_skip) const override {
    RoutingCheck check{at::full({}, -1, expert_ids.options()),
                       at::full({}, -1, expert_ids.options()), weights.clone()};
    const int64_t top_k = expert_ids.size(1);
    const int64_t* ids = expert_ids.const_data_ptr<int64_t>();
    std::vector<int64_t> last_token(num_experts, -1);
    const auto refuse = [&](torch::Tensor& first, int64_t token) {
      auto* value = first.data_ptr<int64_t>();
      *value = *value < 0 ? token : *value;
      check.weights[token].fill_(std::numeric_limits<double>::quiet_NaN());
    };
    AT_DISPATCH_FLOATING_TYPES(weights.scalar_type(), "check_routing", [&] {
      const auto* weight = weights.const_data_ptr<scalar_t>();
      for (int64_t i = 0; i < expert_ids.numel(); ++i) {
        const int64_t token = i / top_k;
        if (may_skip && ids[i] == -1) {
          continue;
        }
        if (!std::isfinite(weight[i])) {
          refuse(check.first_nonfinite_token, token);
        }
        if (ids[i] < 0 || ids[i] >= num_experts || last_token[ids[i]] == token) {
          refuse(check.first_invalid_token, token);
        } else {
          last_token[ids[i]] = token;
        }
      }
    });
    return check;
  }

  SendPlan plan_send(const torch::Tensor& unchecked_ids, const std::vector<int64_t>& first_expert,
                     bool may_skip) const override {
    const int64_t experts = first_expert.back();
    const auto expert_ids = unchecked_ids.clamp(may_skip ? -1 : 0, experts - 1);
    const int64_t tokens = expert_ids.size(0);
    const int64_t assignments = expert_ids.numel();
    const auto ranks = static_cast<int64_t>(first_expert.size()) - 1;
    const auto index = expert_ids.options();
    SendPlan plan;

    plan.rank_rows = at::zeros({ranks}, index);
    plan.token_offsets = at::empty({tokens + 1}, index);
    const TokenRanks pairs = find_token_ranks(expert_ids, rank_of_expert(first_expert),
                                              plan.rank_rows.data_ptr<int64_t>(), ranks,
                                              plan.token_offsets.data_ptr<int64_t>());
    const auto sent = static_cast<int64_t>(pairs.ranks.size());
    const auto segments = offsets_of(plan.rank_rows.const_data_ptr<int64_t>(), ranks);
    plan.send_tokens = at::empty({sent}, index);
    plan.token_rows = at::empty({sent}, index);
    int64_t* send_tokens = plan.send_tokens.data_ptr<int64_t>();
    int64_t* token_rows = plan.token_rows.data_ptr<int64_t>();
    const int64_t* token_offsets = plan.token_offsets.const_data_ptr<int64_t>();
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t i = token_offsets[t]; i < token_offsets[t + 1]; ++i) {
        token_rows[i] = segments[pairs.ranks[i]] + pairs.rows[i];
        send_tokens[token_rows[i]] = t;
      }
    }

    const auto keys = may_skip ? expert_ids.masked_fill(expert_ids < 0, experts) : expert_ids;
    const Csr by_expert = group(keys.flatten(), experts + (may_skip ? 1 : 0));
    plan.expert_counts = sizes_of(by_expert);
    plan.send_order = by_expert.members;
    plan.segment_rows = at::empty({assignments}, index.dtype(torch::kInt32));
    const int64_t* order = plan.send_order.const_data_ptr<int64_t>();
    auto* segment_rows = plan.segment_rows.data_ptr<int32_t>();
    for (int64_t i = 0; i < assignments; ++i) {
      segment_rows[i] = static_cast<int32_t>(pairs.assignment_row[order[i]]);
    }
    return plan;
  }

  LocalPlan plan_local(const torch::Tensor& unchecked_ids, const torch::Tensor& weights,
                       int64_t num_experts, const LateRefusal* /*refusal*/) const override {
    const auto index = unchecked_ids.options();
    const int64_t tokens = unchecked_ids.size(0);
    const int64_t top_k = unchecked_ids.size(1);
    const int64_t assignments = unchecked_ids.numel();
    const int64_t* ids = unchecked_ids.const_data_ptr<int64_t>();
    const Csr by_expert = grouped(assignments, num_experts, index, [&](int64_t i) {
      return std::clamp<int64_t>(ids[i], 0, num_experts - 1);
    });
    const int64_t* order = by_expert.members.const_data_ptr<int64_t>();
    const auto rows = filled(assignments, index, [&](int64_t i) { return order[i] / top_k; });
    const auto counts = sizes_of(by_expert);
    return {counts,
            {by_expert.offsets, largest_first(counts)},
            by_expert.members,
            rows,
            group(rows, tokens),
            filled(std::max(tokens + 1, assignments), index, [](int64_t i) { return i; }),
            weights.defined() ? weights.view(-1).index_select(0, by_expert.members) : weights};
  }

  Verdict judge(const torch::Tensor& told, const torch::Tensor& first_expert, int64_t rank,
                int64_t local, const torch::Tensor& mailbox) const override {
    const Hearing hearing(told, first_expert);
    Verdict verdict{at::zeros({}, told.options()),
                    at::zeros({3, hearing.ranks}, told.options()),
                    at::zeros({3, hearing.ranks}, told.options()),
                    {},
                    {}};
    auto* const tell = mailbox.data_ptr<int64_t>();
    const bool exceeded = hearing.exceeds_a_room();
    const int64_t refusing = hearing.first_refusing();
    if (hearing.of(rank)[kToldNonfinite] >= 0) tell[0] = hearing.of(rank)[kToldNonfinite];
    if (hearing.of(rank)[kToldInvalid] >= 0) tell[1] = hearing.of(rank)[kToldInvalid];
    if (refusing < hearing.ranks) tell[2] = refusing;
    if (exceeded) tell[3] = 1;
    const bool spoilt = exceeded || refusing < hearing.ranks || !hearing.is_sound();
    verdict.spoilt.fill_(spoilt ? 1 : 0);
    const auto heard = spoilt ? at::zeros_like(told) : told;
    const Hearing counts(heard, first_expert);
    for (int64_t other = 0; other < hearing.ranks; ++other) {
      for (const int64_t to : {int64_t{0}, int64_t{2}}) {
        verdict.row_counts[to][other] = counts.rows(rank, other);
        verdict.assignment_counts[to][other] = counts.assignments(rank, other);
      }
      verdict.row_counts[1][other] = counts.rows(other, rank);
      verdict.assignment_counts[1][other] = counts.assignments(other, rank);
    }
    const int64_t first = kTold + hearing.ranks + hearing.first_expert[rank];
    verdict.ends = ArrivalEnds::of(heard.select(1, kTold + rank), heard.narrow(1, first, local));
    const auto of_experts = heard.narrow(1, first, local).sum(0);
    verdict.counts = {at::cat({at::zeros({1}, told.options()), of_experts.cumsum(0)}),
                      largest_first(of_experts)};
    return verdict;
  }

  ArrivalOrder order_arrivals(const torch::Tensor& segment_rows, const ArrivalEnds& ends,
                              int64_t none) const override {
    const int64_t ranks = ends.rows.size(0);
    const int64_t experts = ends.by_source.size(0) / ranks;
    const auto* source_end = ends.by_source.const_data_ptr<int64_t>();
    const auto* row_end = ends.rows.const_data_ptr<int64_t>();
    ArrivalOrder order{at::empty({segment_rows.size(0)}, ends.rows.options()),
                       at::empty({segment_rows.size(0)}, ends.rows.options())};
    const auto* segment_row = segment_rows.const_data_ptr<int32_t>();
    int64_t* received_order = order.received_order.data_ptr<int64_t>();
    int64_t* assignment_rows = order.assignment_rows.data_ptr<int64_t>();
    int64_t p = 0;
    for (int64_t expert = 0; expert < experts; ++expert) {
      for (int64_t rank = 0; rank < ranks; ++rank) {
        const int64_t segment = rank * experts + expert;
        const int64_t first_row = rank > 0 ? row_end[rank - 1] : 0;
        for (int64_t i = segment > 0 ? source_end[segment - 1] : 0; i < source_end[segment];
             ++i, ++p) {
          received_order[p] = i;
          assignment_rows[p] = first_row + segment_row[i];
        }
      }
    }
    for (; p < segment_rows.size(0); ++p) {
      received_order[p] = p;
      assignment_rows[p] = none;
    }
    return order;
  }

  Csr group(const torch::Tensor& group_of, int64_t groups) const override {
    const int64_t* value = group_of.const_data_ptr<int64_t>();
    return grouped(group_of.numel(), groups, group_of.options(),
                   [value](int64_t i) { return value[i]; });
  }
};

}  // namespace

const PlanKernels& PlanKernels::cpu() {
  static const CpuPlanKernels kernels;
  return kernels;
}

}  // namespace anabranch
