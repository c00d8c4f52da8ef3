#include "routing/noisy_top_k.h"

#include <ATen/ops/special_ndtr.h>
#include <ATen/ops/topk.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

namespace anabranch {
namespace {

/// [T, E] `values` [T, top_k] at their experts, zeros elsewhere.
torch::Tensor spread(const torch::Tensor& expert_ids, const torch::Tensor& values,
                     int64_t num_experts) {
  return at::zeros({expert_ids.size(0), num_experts}, values.options().requires_grad(false))
      .scatter(1, expert_ids, values);
}

}  // namespace

torch::Tensor weights_per_expert(const Routing& routing, int64_t num_experts) {
  return spread(routing.expert_ids, routing.weights, num_experts).sum(0);
}

torch::Tensor smooth_load(const torch::Tensor& logits, const torch::Tensor& noisy,
                          const torch::Tensor& deviation, const torch::Tensor& expert_ids) {
  const int64_t experts = logits.size(1);
  const int64_t top_k = expert_ids.size(1);
  if (top_k == experts) {  // every expert is always chosen
    return at::zeros({experts}, logits.options().requires_grad(false)).add_(logits.size(0));
  }
  const auto best = std::get<0>(at::topk(noisy, top_k + 1, /*dim=*/1));
  const auto chosen =
      spread(expert_ids, at::zeros_like(expert_ids, torch::kBool).logical_not(), experts);
  // The k-th largest without the expert itself: of a chosen one, the next after the chosen.
  const auto threshold = at::where(chosen, best.narrow(1, top_k, 1), best.narrow(1, top_k - 1, 1));
  return at::special_ndtr((logits - threshold) / deviation).sum(0);
}

}  // namespace anabranch
