#pragma once

#include <anabranch/routing.h>

namespace anabranch {

/// What `route` does with the logits of a gate, gate_logits(x, gate_weight): in one step of autograd, with
/// fewer launches. x [T, h], gate_weight [E, h] fp32 or fp64, a bias of the experts of its type.
Routing route_rows(const torch::Tensor& x, const torch::Tensor& gate_weight,
                   const RoutingRule& rule, const RoutingConditions& conditions = {});

/// What `route` does with a choice, `conditions.expert_ids`, that a gate has made of the same logits: its ids are known to
/// be valid, and nobody checks or copies them.
Routing route_chosen(const torch::Tensor& logits, const RoutingRule& rule,
                     const RoutingConditions& conditions);

/// What `route` does, with the bias of the experts added to their logits, by which they are chosen.
Routing route_by_biased_logits(const torch::Tensor& logits, const RoutingRule& rule,
                               const RoutingConditions& conditions);

}  // namespace anabranch
