#pragma once

#include <ATen/core/ivalue.h>
#include <anabranch/exchange.h>
#include <anabranch/experts.h>

#include <memory>
#include <vector>

#include "balance/lane.h"
#include "balance/loads.h"

namespace anabranch {

/// Experts in a step that lends some of them.
struct Borrowed {
  ExpertProjections own;      ///< this rank's, as they were
  WeightSums main_grad;       ///< theirs, of those that are trained
  ExpertProjections experts;  ///< [borrowed, ..] each, by loan; there when await_borrowed is back
  /// Where backward puts the weights' gradients of `experts`, unrounded, for their way back.
  WeightSums sums;
  c10::intrusive_ptr<torch::CustomClassHolder> travel;  ///< what await_borrowed waits for
};
/// Sends lent experts' parameters to their borrowers, an expert's in equal parts by way of each rank. The backward
/// adds the borrowers' gradients in the order of ranks, in fp32 (fp64), brings the sums back the same way, and adds
/// them to those of `own`, or to the owner's `main_grad` where it is defined. By `lane` they travel beside what the
/// caller does, without one before this returns. Collective, forward and backward, in which each rank takes part that
/// wants a gradient of its parameters, of `rows` or of the routing's `weights`.
Borrowed borrow(const ExpertProjections& own, const WeightSums& main_grad,
                const std::vector<Loan>& loans, const Exchange& exchange, const torch::Tensor& rows,
                const torch::Tensor& weights, std::shared_ptr<Lane> lane);

/// Waits for `borrowed.experts`, once. `owned` is what owners have computed of the step's tokens, and comes back. So in
/// backward, by a lane, what borrowers have found sets out before the owners' tokens have their turn, and is there behind
/// it; without one it travels then.
torch::Tensor await_borrowed(const torch::Tensor& owned, Borrowed& borrowed);

}  // namespace anabranch
