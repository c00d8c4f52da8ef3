#pragma once

#include <anabranch/experts.h>

#include "experts/feed_forward.h"

namespace anabranch {

/// An expert of `options.shared_expert_hidden_size` that every rank holds whole, seeded apart from
/// the others.
Experts make_shared_expert(const MoEOptions& options);

/// x [T, h] → [T, h]: every token through the shared expert, with weight 1.
torch::Tensor through_shared_expert(const torch::Tensor& x, const ExpertProjections& shared_expert,
                                    const FeedForward& expert);

}  // namespace anabranch
