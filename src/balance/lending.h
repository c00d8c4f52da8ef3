#pragma once

#include <anabranch/exchange.h>
#include <anabranch/experts.h>

#include <vector>

#include "balance/loads.h"

namespace anabranch {

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
