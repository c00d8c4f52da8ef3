#pragma once

#include <anabranch/exchange.h>
#include <anabranch/experts.h>

#include <optional>
#include <vector>

#include "balance/loads.h"

namespace anabranch {

/// A step's routing in two: what travels to the owners of its experts, and what goes to borrowers. The weights are
/// those of the whole, of which each assignment has one in one of them.
struct SplitRouting {
  Routing owned;
  Routing lent;  ///< ids are places of `exchange`: a rank's are the loans that it borrows
  /// To the borrowers. Of this rank alone where every rank computes its own tokens, and none where it then has
  /// borrowed nothing.
  std::optional<Exchange> exchange;
};
SplitRouting split_routing(const Routing& routing, const std::vector<Loan>& loans,
                           const Exchange& exchange);

/// Experts in a step that lends some of them.
struct Borrowed {
  ExpertProjections own;      ///< this rank's, as they were
  WeightSums main_grad;       ///< theirs, of those that are trained
  ExpertProjections experts;  ///< [borrowed, ..] each, by loan
  /// Where backward puts the weights' gradients of `experts`, unrounded, for their way back.
  WeightSums sums;
};
/// Brings lent experts' parameters to their borrowers, an expert's in equal parts by way of each rank. The backward
/// adds the borrowers' gradients in the order of ranks, in fp32 (fp64), brings the sums back the same way, and adds
/// them to those of `own`, or to the owner's `main_grad` where it is defined. Collective, forward and backward, in which
/// each rank takes part that wants a gradient of its parameters, of `rows` or of the routing's `weights`.
Borrowed borrow(const ExpertProjections& own, const WeightSums& main_grad,
                const std::vector<Loan>& loans, const Exchange& exchange, const torch::Tensor& rows,
                const torch::Tensor& weights);

}  // namespace anabranch
