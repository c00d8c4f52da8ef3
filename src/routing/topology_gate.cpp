#include "routing/topology_gate.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <anabranch/router.h>

#include <limits>

namespace anabranch {
namespace {

/// [n] which of the values, largest first, each is: ties by place.
torch::Tensor ranks_of(const torch::Tensor& values) {
  const auto order = values.argsort(/*stable=*/true, /*dim=*/0, /*descending=*/true);
  return at::empty_like(order).scatter_(0, order, at::arange(order.size(0), order.options()));
}

/// [T, top_k] the near experts of each token by falling score, then others.
torch::Tensor near_choice(const torch::Tensor& logits, const RoutingRule& rule,
                          const RoutingConditions& given) {
  RoutingConditions conditions;
  conditions.padding_mask = given.padding_mask;
  constexpr double kBelow = -1e30;  // any score and bias
  auto bias = given.expert_bias.defined() ? given.expert_bias
                                          : at::zeros({logits.size(1)}, logits.options());
  conditions.expert_bias = bias.masked_fill(given.near_experts.logical_not(), kBelow);
  return route(logits, rule, conditions).expert_ids;
}

}  // namespace

torch::Tensor choose_near(const torch::Tensor& logits, const Routing& choice,
                          const RoutingRule& rule, const RoutingConditions& conditions,
                          double share) {
  const torch::NoGradGuard no_grad;
  const auto& ids = choice.expert_ids;
  const auto is_near = [&](const torch::Tensor& experts) {
    return conditions.near_experts.index_select(0, experts.clamp_min(0).flatten())
        .view(experts.sizes());
  };
  const auto chosen = ids >= 0;
  const auto near = is_near(ids).logical_and(chosen);
  const auto far = chosen.logical_and(near.logical_not());
  const auto limit = (chosen.sum().to(torch::kFloat64) * share).floor();
  const auto weights = choice.weights.detach();
  const auto by_weight =
      ranks_of(at::where(far, weights, -std::numeric_limits<double>::infinity()).flatten());
  const auto loses = far.logical_and(by_weight.view(ids.sizes()) >= limit);
  // The near ones that a token has are its best near ones, as both choices are by the same scores.
  const auto next = near.sum(1, /*keepdim=*/true) + loses.cumsum(1) - 1;
  const auto best = near_choice(logits, rule, conditions);
  const auto instead = best.gather(1, next.clamp(0, best.size(1) - 1));
  return at::where(loses.logical_and(is_near(instead)).logical_and(instead >= 0), instead, ids);
}

}  // namespace anabranch
