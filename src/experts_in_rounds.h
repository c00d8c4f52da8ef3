#pragma once

#include <anabranch/exchange.h>
#include <anabranch/experts.h>

#include "exchange/rounds.h"
#include "experts/feed_forward.h"

namespace anabranch {

/// The way of the tokens through the experts of all ranks as in moe_layer.cpp, x [T, h] and routing weights
/// [T, top_k] → y [T, h], a round after another. Of the rows of a round nothing is kept: backward
/// dispatches x again, beside the gradient, and computes what it needs anew. The sums of the experts'
/// gradients over the rounds are kept in fp32 (fp64). Collective, forward and backward.
torch::Tensor through_experts_in_rounds(const torch::Tensor& x, const torch::Tensor& weights,
                                        const ExpertProjections& experts,
                                        const WeightSums& main_grad, const FeedForward& expert,
                                        const Exchange& exchange, Rounds rounds);

}  // namespace anabranch
