#include <ATen/ops/arange.h>
#include <ATen/ops/cumsum.h>
#include <ATen/ops/diff.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

#include "kernels/plan.h"
#include "kernels/cuda/plan/judge.h"
#include "kernels/cuda/plan/plan.h"
#include "kernels/cuda/tensors.h"
#include "support/block.h"

namespace anabranch {
namespace {

/// The part of a send plan that is about rows: everything but the order of assignments.
void plan_rows(const torch::Tensor& expert_ids, const std::vector<int64_t>& first_expert,
               SendPlan& plan, cudaStream_t stream) {
  const int64_t tokens = expert_ids.size(0);
  const int64_t top_k = expert_ids.size(1);
  const int64_t assignments = tokens * top_k;
  const auto ranks = static_cast<int64_t>(first_expert.size()) - 1;
  const auto index = expert_ids.options();
  const torch::Tensor first = at::empty({assignments}, index);
  const torch::Tensor key = at::empty({assignments}, index);
  const torch::Tensor rows_of_token = at::empty({tokens}, index);
  const cuda::TokenRanks pairs{first.data_ptr<int64_t>(), key.data_ptr<int64_t>(),
                               rows_of_token.data_ptr<int64_t>()};
  cuda::launch_token_ranks(expert_ids.const_data_ptr<int64_t>(), tokens, top_k,
                           upload(first_expert, expert_ids.device()).const_data_ptr<int64_t>(),
                           ranks, pairs, stream);
  // Assignments that are not the first of their (token, rank) go last, behind all sent rows.
  const Csr sent = PlanKernels::cuda().group(key, ranks + 1);
  plan.rank_rows = sent.offsets.diff().narrow(0, 0, ranks).contiguous();
  const torch::Tensor row_of = at::empty({assignments}, index);
  plan.send_tokens = at::empty({assignments}, index);
  cuda::launch_send_tokens(sent.members.const_data_ptr<int64_t>(), assignments, top_k,
                           plan.send_tokens.data_ptr<int64_t>(), row_of.data_ptr<int64_t>(),
                           stream);
  plan.token_offsets = at::zeros({tokens + 1}, index);
  auto token_ends = plan.token_offsets.narrow(0, 1, tokens);
  at::cumsum_out(token_ends, rows_of_token, 0);
  plan.token_rows = at::empty({assignments}, index);
  cuda::launch_token_rows(pairs, row_of.const_data_ptr<int64_t>(),
                          plan.token_offsets.const_data_ptr<int64_t>(), tokens, top_k, ranks,
                          plan.token_rows.data_ptr<int64_t>(), stream);
  cuda::launch_segment_rows(plan.send_order.const_data_ptr<int64_t>(), assignments, pairs,
                            row_of.const_data_ptr<int64_t>(),
                            sent.offsets.const_data_ptr<int64_t>(),
                            plan.segment_rows.data_ptr<int32_t>(), stream);
}

/// One rank: every token is sent once, to this rank.
void plan_rows_of_one_rank(const torch::Tensor& expert_ids, SendPlan& plan) {
  const int64_t tokens = expert_ids.size(0);
  const auto index = expert_ids.options();
  plan.rank_rows = at::full({1}, tokens, index);
  plan.token_offsets = at::arange(tokens + 1, index);
  plan.send_tokens = plan.token_offsets.narrow(0, 0, tokens);
  plan.token_rows = plan.send_tokens;
  plan.segment_rows.copy_(plan.send_order.div(expert_ids.size(1), "trunc"));
}

class CudaPlanKernels final : public PlanKernels {
 public:
  RoutingCheck check_routing(const torch::Tensor& expert_ids, const torch::Tensor& weights,
                             int64_t num_experts, bool may_skip) const override {
    const OnDevice stream(expert_ids);
    const torch::Tensor tokens = at::full({2}, -1, expert_ids.options());
    RoutingCheck check{tokens.select(0, 0), tokens.select(0, 1), at::empty_like(weights)};
    cuda::launch_check_routing(
        {cuda::scalar_of(weights), expert_ids.const_data_ptr<int64_t>(), weights.const_data_ptr(),
         expert_ids.size(0), expert_ids.size(1), num_experts, may_skip ? -1 : 0},
        check.first_nonfinite_token.data_ptr<int64_t>(),
        check.first_invalid_token.data_ptr<int64_t>(), check.weights.data_ptr(), stream);
    return check;
  }

  SendPlan plan_send(const torch::Tensor& expert_ids, const std::vector<int64_t>& first_expert,
                     bool may_skip) const override {
    const OnDevice stream(expert_ids);
    SendPlan plan;
    const Csr by_expert = group(expert_ids.flatten(), first_expert.back() + (may_skip ? 1 : 0));
    plan.expert_counts = by_expert.offsets.diff();
    plan.send_order = by_expert.members;
    plan.segment_rows = at::empty({expert_ids.numel()}, expert_ids.options().dtype(torch::kInt32));
    if (first_expert.size() == 2) {
      plan_rows_of_one_rank(expert_ids, plan);
    } else {
      plan_rows(expert_ids, first_expert, plan, stream);
    }
    return plan;
  }

  LocalPlan plan_local(const torch::Tensor& expert_ids, const torch::Tensor& weights,
                       int64_t num_experts, const LateRefusal* refusal) const override {
    const OnDevice stream(expert_ids);
    const int64_t tokens = expert_ids.size(0);
    const int64_t assignments = expert_ids.numel();
    constexpr auto kIndex = torch::kInt64;
    const int64_t most = std::max(tokens + 1, assignments);
    const bool weighted = weights.defined();
    const auto weight_type = weighted ? weights.scalar_type() : kIndex;
    Block block;
    block.room(num_experts + 1, kIndex).room(assignments, kIndex).room(num_experts, kIndex);
    block.room(assignments, kIndex).room(tokens + 1, kIndex).room(assignments, kIndex);
    block.room(most, kIndex).room(weighted ? assignments : 0, weight_type);
    block.allocate(expert_ids.device());
    const Csr by_expert{block.take({num_experts + 1}, kIndex), block.take({assignments}, kIndex)};
    group_into(by_expert, expert_ids, num_experts, stream);
    LocalPlan plan{
        at::empty({num_experts}, expert_ids.options()),  // whoever asks for the load keeps it
        {by_expert.offsets, block.take({num_experts}, kIndex)},
        by_expert.members,
        block.take({assignments}, kIndex),
        {block.take({tokens + 1}, kIndex), block.take({assignments}, kIndex)},
        block.take({most}, kIndex),
        weighted ? block.take({assignments}, weight_type) : weights};
    const auto numbers = [](const torch::Tensor& tensor) {
      return tensor.defined() ? tensor.data_ptr<int64_t>() : nullptr;
    };
    const LateRefusal none;
    const LateRefusal& late = refusal != nullptr ? *refusal : none;
    cuda::launch_local(
        {expert_ids.const_data_ptr<int64_t>(), by_expert.members.const_data_ptr<int64_t>(),
         by_expert.offsets.const_data_ptr<int64_t>(), tokens, expert_ids.size(1), num_experts,
         plan.expert_counts.data_ptr<int64_t>(), plan.counts.longest_first.data_ptr<int64_t>(),
         plan.assignment_rows.data_ptr<int64_t>(), plan.by_row.offsets.data_ptr<int64_t>(),
         plan.by_row.members.data_ptr<int64_t>(), plan.places.data_ptr<int64_t>(),
         numbers(late.first_nonfinite_token), numbers(late.first_invalid_token), numbers(late.told),
         cuda::address_or_null(weights), weights.defined() ? plan.weights.data_ptr() : nullptr,
         weights.defined() && weights.scalar_type() == torch::kFloat64},
        stream);
    return plan;
  }

  ArrivalOrder order_arrivals(const torch::Tensor& segment_rows, const ArrivalEnds& ends,
                              int64_t none) const override {
    const OnDevice stream(segment_rows);
    const int64_t count = segment_rows.size(0);
    const int64_t ranks = ends.rows.size(0);
    ArrivalOrder order{at::empty({count}, ends.rows.options()),
                       at::empty({count}, ends.rows.options())};
    cuda::launch_order_arrivals(
        segment_rows.const_data_ptr<int32_t>(), count, ends.by_source.const_data_ptr<int64_t>(),
        ends.by_expert.const_data_ptr<int64_t>(), ends.rows.const_data_ptr<int64_t>(), ranks,
        ends.by_source.size(0) / ranks, none, order.received_order.data_ptr<int64_t>(),
        order.assignment_rows.data_ptr<int64_t>(), stream);
    return order;
  }

  Verdict judge(const torch::Tensor& told, const torch::Tensor& first_expert, int64_t rank,
                int64_t local, const torch::Tensor& mailbox) const override {
    const OnDevice stream(told);
    const int64_t ranks = told.size(0);
    const int64_t pieces = ranks * local;
    constexpr auto kIndex = torch::kInt64;
    Block block;
    block.room(1, kIndex).room(3 * ranks, kIndex).room(3 * ranks, kIndex);
    block.room(local + 1, kIndex).room(local, kIndex);
    block.room(pieces, kIndex).room(pieces, kIndex).room(ranks, kIndex);
    block.allocate(told.device());
    Verdict verdict{
        block.take({}, kIndex),
        block.take({3, ranks}, kIndex),
        block.take({3, ranks}, kIndex),
        {block.take({local + 1}, kIndex), block.take({local}, kIndex)},
        {block.take({pieces}, kIndex), block.take({pieces}, kIndex), block.take({ranks}, kIndex)}};
    const auto address = [](const torch::Tensor& tensor) { return tensor.data_ptr<int64_t>(); };
    const auto& ends = verdict.ends;
    cuda::launch_judge({told.const_data_ptr<int64_t>(),
                        first_expert.const_data_ptr<int64_t>(),
                        ranks,
                        told.size(1) - kTold - ranks,
                        rank,
                        local,
                        address(verdict.spoilt),
                        address(verdict.row_counts),
                        address(verdict.assignment_counts),
                        address(verdict.counts.first_row),
                        address(verdict.counts.longest_first),
                        {address(ends.by_source), address(ends.by_expert), address(ends.rows)},
                        address(mailbox)},
                       stream);
    return verdict;
  }

  Csr group(const torch::Tensor& group_of, int64_t groups) const override {
    const OnDevice stream(group_of);
    const Csr result{at::empty({groups + 1}, group_of.options()), at::empty_like(group_of)};
    group_into(result, group_of, groups, stream);
    return result;
  }

 private:
  /// `group_of`: of any shape, contiguous.
  static void group_into(const Csr& result, const torch::Tensor& group_of, int64_t groups,
                         cudaStream_t stream) {
    const int64_t count = group_of.numel();
    const torch::Tensor scratch =
        at::empty({cuda::group_scratch(count, groups)}, group_of.options());
    cuda::launch_group(group_of.const_data_ptr<int64_t>(), count, groups,
                       scratch.data_ptr<int64_t>(), result.offsets.data_ptr<int64_t>(),
                       result.members.data_ptr<int64_t>(), stream);
  }
};

}  // namespace

const PlanKernels& PlanKernels::cuda() {
  static const CudaPlanKernels kernels;
  return kernels;
}

}  // namespace anabranch
