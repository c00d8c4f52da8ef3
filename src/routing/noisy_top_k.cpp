#include "routing/noisy_top_k.h"

#include <ATen/ops/ones_like.h>
#include <ATen/ops/special_ndtr.h>
#include <ATen/ops/topk.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

namespace anabranch {
namespace {

/// [T, E] `values` [T, top_k] at their experts, zeros elsewhere; an id of −1 is none.
torch::Tensor spread(const torch::Tensor& expert_ids, const torch::Tensor& values,
                     int64_t num_experts) {
  const auto places =
      expert_ids.where(expert_ids.ge(0), num_experts);  // a column of those that are none
  return at::zeros({expert_ids.size(0), num_experts + 1}, values.options().requires_grad(false))
      .scatter(1, places, values)
      .narrow(1, 0, num_experts);
}

}  // namespace

torch::Tensor weights_per_expert(const Routing& routing, int64_t num_experts) {
  return spread(routing.expert_ids, routing.weights, num_experts).sum(0);
}

torch::Tensor smooth_load(const torch::Tensor& logits, const torch::Tensor& noisy,
                          const torch::Tensor& deviation, const torch::Tensor& expert_ids,
                          const torch::Tensor& padding_mask) {
  const int64_t experts = logits.size(1);
  const int64_t top_k = expert_ids.size(1);
  const auto sum_over_tokens = [&](const torch::Tensor& of_tokens) {
    return padding_mask.defined() ? of_tokens.masked_fill(padding_mask.unsqueeze(1), 0).sum(0)
                                  : of_tokens.sum(0);
  };
  if (top_k == experts) {  // every expert is always chosen
    return sum_over_tokens(at::ones_like(logits.detach()));
  }
  const auto best = std::get<0>(at::topk(noisy, top_k + 1, /*dim=*/1));
  const auto chosen = spread(expert_ids, expert_ids.ge(0), experts);
  // The k-th largest without the expert itself: of a chosen one, the next after the chosen.
  const auto threshold = at::where(chosen, best.narrow(1, top_k, 1), best.narrow(1, top_k - 1, 1));
  return sum_over_tokens(at::special_ndtr((logits - threshold) / deviation));
}

}  // namespace anabranch
