#pragma once

#include <anabranch/experts.h>

#include <optional>

#include "experts/feed_forward.h"

namespace anabranch {

/// An expert of `options.shared_expert_hidden_size` that every rank holds whole, seeded apart from
/// the others.
Experts make_shared_expert(const MoEOptions& options);

/// What `through_shared_expert` computes, without a graph.
FeedForwardOutput shared_expert_ahead(const torch::Tensor& x,
                                      const ExpertProjections& shared_expert,
                                      const FeedForward& expert);

/// x [T, h] → [T, h]: every token through the shared expert, with weight 1. `ahead`: it has been
/// computed already, of the same.
torch::Tensor through_shared_expert(const torch::Tensor& x, const ExpertProjections& shared_expert,
                                    const WeightSums& main_grad, const FeedForward& expert,
                                    std::optional<FeedForwardOutput> ahead = {});

/// [1, h] of the layer's type, seeded apart from the rest.
torch::Tensor make_shared_expert_gate(const MoEOptions& options);

/// `y` [T, h] · sigmoid(x · gate) of each token, the sigmoid in fp32 (fp64); `y` where `gate` is
/// undefined.
torch::Tensor gated(const torch::Tensor& y, const torch::Tensor& x, const torch::Tensor& gate);

}  // namespace anabranch
