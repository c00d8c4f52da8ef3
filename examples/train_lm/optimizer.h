#pragma once

#include <anabranch/optimizers.h>

#include <memory>
#include <vector>

#include "options.h"

namespace train_lm {

/// Over all parameters of this rank; weight decay on matrices only. Its steps are collective if it is sharded.
std::unique_ptr<anabranch::ParallelOptimizer> make_optimizer(
    const std::vector<anabranch::ParallelParameter>& parameters,
    const anabranch::ParallelGroups& groups, const Options& options);

/// Linear warm-up to the peak, then a cosine to a tenth of it. `step` counts from 1.
double learning_rate_at(int64_t step, const TrainingOptions& options);

}  // namespace train_lm
