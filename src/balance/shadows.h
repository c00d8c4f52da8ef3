#pragma once

#include <anabranch/exchange.h>
#include <anabranch/experts.h>

#include <vector>

namespace anabranch {

/// A step's routing in two: what travels to the owners of its experts, and what stays with experts whose
/// weights travel. The weights are those of the whole, of which each assignment has one in one of them.
struct SplitRouting {
  Routing travelling;
  Routing staying;  ///< ids are places among the shadowed experts
};
/// An owner's own tokens are part of what travels: they do not leave it.
SplitRouting split_routing(const Routing& routing, const std::vector<int64_t>& shadowed,
                           const ExpertPlacement& placement, int64_t rank);

/// Shadowed experts as every rank has them in a step.
struct Shadows {
  ExpertProjections experts;  ///< [shadowed, ..] each
  /// Where backward puts the weights' gradients, unrounded, for their way back.
  WeightSums sums;
};
/// Brings the shadowed experts' parameters to all ranks, an expert's in equal parts by way of each. The backward
/// adds the ranks' gradients in their order, in fp32 (fp64), and brings the sums back the same way, to the
/// owner's `main_grad` where it is defined. Collective, forward and backward.
Shadows bring_shadows(const ExpertProjections& own, const WeightSums& main_grad,
                      const std::vector<int64_t>& shadowed, const Exchange& exchange);

}  // namespace anabranch
