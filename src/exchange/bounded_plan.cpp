#include "exchange/bounded_plan.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

// Sizes are the host's, which knows rooms; numbers are the device's. All that is decided about a step is decided
// by every rank from the same numbers, so all decide alike.

namespace anabranch {
namespace {

/// [W, kTold + W + places], a row of every rank.
torch::Tensor tell_all(std::vector<torch::Tensor> head, const torch::Tensor& to_all,
                       const SendPlan& send, int64_t places, Communicator& communicator) {
  const int64_t ranks = communicator.size();
  head.insert(head.end(), {send.rank_rows, send.expert_counts.narrow(0, 0, places)});
  const auto message = at::cat(head);
  const auto told = at::empty({ranks, message.size(0)}, message.options());
  const std::vector<int64_t> once(ranks, 1);
  communicator.all_to_all_v({{message.view({1, -1}), once, told, once, to_all}});
  return told;
}

}  // namespace

Room room_for(double capacity, int64_t tokens, int64_t top_k, const ExpertPlacement& placement,
              int64_t rank) {
  const int64_t all = tokens * placement.num_ranks;
  const int64_t most = all * std::min(top_k, placement.local_experts(rank));
  const double wanted = std::ceil(capacity * static_cast<double>(tokens * top_k));
  const int64_t assignments =
      wanted < static_cast<double>(most) ? static_cast<int64_t>(wanted) : most;
  return {std::min(assignments, all), assignments};
}

PendingPlan begin_plan_within(const Room& room, Departures own, std::vector<torch::Tensor> head,
                              const torch::Tensor& to_all, const torch::Tensor& source_counts,
                              const torch::Tensor& first_place, const ExpertPlacement& placement,
                              std::shared_ptr<Communicator> communicator,
                              const LateRefusals& late) {
  const auto told =
      tell_all(std::move(head), to_all, own.send, placement.num_places(), *communicator);
  const int64_t rank = communicator->rank();
  const Verdict verdict =
      PlanKernels::on(told.device())
          .judge(told, first_place, rank, placement.local_experts(rank), late.told());
  const SendPlan& send = own.send;
  ExchangePlan plan;
  plan.tokens = own.ids.size(0);
  plan.top_k = own.ids.size(1);
  plan.spoilt = verdict.spoilt;
  plan.row_counts = verdict.row_counts;
  plan.assignment_counts = verdict.assignment_counts;
  plan.expert_counts = ExpertCounts(verdict.counts, room.assignments);
  plan.source_counts = send.expert_counts.narrow(0, 0, placement.num_places());
  const int64_t most_sent = plan.tokens * std::min(plan.top_k, placement.num_ranks);
  plan.send_tokens = send.send_tokens.narrow(0, 0, std::min(send.send_tokens.size(0), most_sent));
  plan.token_offsets = send.token_offsets;
  plan.token_rows = send.token_rows;
  plan.send_order = send.send_order;
  return {source_counts,
          [plan, own = std::move(own), ends = verdict.ends, room, communicator](
              const torch::Tensor& rows, torch::Tensor& received) {
            ExchangePlan whole = plan;
            received = receive_into(whole, own, rows, ends, room, *communicator);
            return whole;
          },
          /*any_sums_losses=*/nullptr};
}

}  // namespace anabranch
