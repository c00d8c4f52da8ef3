#include "routing/auxiliary_losses.h"

#include <ATen/ops/bincount.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>

namespace anabranch {

// Layout: assignments of each expert [E], tokens [1] and, unless the routing is from outside,
// probability sums [E], sum of squared logsumexp [1].

torch::Tensor batch_sums(const Routing& routing, int64_t num_experts) {
  const auto fp64 = routing.weights.options().dtype(torch::kFloat64);
  const auto counts = routing.counts.defined()
                          ? routing.counts
                          : at::bincount(routing.expert_ids.flatten(), {}, num_experts);
  std::vector<torch::Tensor> parts = {
      counts.to(torch::kFloat64),
      at::full({1}, static_cast<double>(routing.expert_ids.size(0)), fp64.requires_grad(false))};
  if (routing.probability_sum.defined()) {
    parts.push_back(routing.probability_sum.to(torch::kFloat64));
    parts.push_back(routing.squared_logsumexp_sum.to(torch::kFloat64).reshape(1));
  }
  return at::cat(parts);
}

AuxiliaryLosses auxiliary_losses(const torch::Tensor& sums, int64_t num_experts, int64_t top_k,
                                 torch::Dtype dtype) {
  const auto counts = sums.narrow(0, 0, num_experts).detach();
  AuxiliaryLosses losses;
  losses.expert_load = counts.to(torch::kInt64);
  if (sums.size(0) > num_experts + 1) {
    const auto tokens = sums[num_experts].detach().clamp_min(1);  // no tokens at all: losses are 0
    const auto share = counts / (tokens * top_k);
    const auto probability = sums.narrow(0, num_experts + 1, num_experts) / tokens;
    losses.balance_loss = ((share * probability).sum() * num_experts).to(dtype);
    losses.z_loss = (sums[2 * num_experts + 1] / tokens).to(dtype);
  }
  return losses;
}

}  // namespace anabranch
