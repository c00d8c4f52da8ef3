#pragma once

#include <anabranch/routing.h>

#include "kernels/routing.h"

namespace anabranch {

/// What `route` does with the logits of a gate, gate_logits(x, gate_weight): in one step of autograd, with
/// fewer launches. x [T, h], gate_weight [E, h] fp32 or fp64, a bias of the experts of its type.
Routing route_rows(const torch::Tensor& x, const torch::Tensor& gate_weight,
                   const RoutingRule& rule, const RoutingConditions& conditions = {});

/// What `route` does where a gate has a say in the choice. One that is made is known to be valid: nobody checks or copies
/// its ids.
Routing route_by(Choice choice, const torch::Tensor& logits, const RoutingRule& rule,
                 const RoutingConditions& conditions);

}  // namespace anabranch
