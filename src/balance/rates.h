#pragma once

#include <anabranch/communicator.h>

#include "balance/loads.h"
#include "experts/feed_forward.h"

namespace anabranch {

/// Of a rank's device and its link.
struct Rates {
  double flops = 0;  ///< floating-point operations a second of experts' products
  double bytes = 0;  ///< a second to and, at the same time, from other ranks
};

/// The same in all runs: of a core and 10-gigabit Ethernet, or of a GPU and the links within a node.
Rates nominal_rates(torch::Device device);

/// Measured on all ranks at the same time; what the slowest has, so the same on all. Collective.
Rates measure_rates(const FeedForward& expert, const ExpertProjections& experts,
                    Communicator& communicator);

/// Of a layer's training step.
StepCosts step_costs(const MoEOptions& options, int64_t ranks, const Rates& rates);

}  // namespace anabranch
