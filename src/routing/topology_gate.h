#pragma once

#include <anabranch/routing.h>

namespace anabranch {

/// FasterMoE's topology-aware gate (doi:10.1145/3503221.3508418): at most `share` of the rank's choices, rounded down,
/// go to experts that are not `near` [E] bool: those of the highest weights. A token that loses some takes the best of
/// the near experts that it has not, or keeps what it had where there is none left.
/// `logits` [T, E] and `choice` by `rule`, of one group, under `conditions`. Returns [T, top_k] experts. The host does
/// not wait.
torch::Tensor choose_near(const torch::Tensor& logits, const Routing& choice,
                          const RoutingRule& rule, const RoutingConditions& conditions,
                          double share);

}  // namespace anabranch
