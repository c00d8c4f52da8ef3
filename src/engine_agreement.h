#pragma once

#include <anabranch/communicator.h>

#include <vector>

#include "experts/feed_forward.h"

namespace anabranch {

/// Experts that are to be tried, and on how many rows each.
struct Trial {
  ExpertProjections parameters;
  WeightSums main_grad;
  ExpertCounts counts;
};

/// Lets an engine that chooses choose alike on all ranks: rank 0 tries the experts, forward and, where
/// gradients are recorded, backward, so that what they multiply has been measured, and all settle on what
/// it chose. Nobody measures afterwards, and nobody waits for one who does.
///
/// Collective until the engine is settled, which takes a step in which any rank has rows: `trials[0]`.
void settle_engine(const FeedForward& expert, const std::vector<Trial>& trials, bool recompute,
                   Communicator& communicator);

}  // namespace anabranch
