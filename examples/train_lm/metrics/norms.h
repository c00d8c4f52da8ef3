#pragma once

#include <anabranch/parameters.h>

#include <string>
#include <utility>
#include <vector>

namespace train_lm {

/// L2 norm of the finished gradient of each part of the model, in the order in which they come in it:
/// "embedding", "attention", "experts", "router", "norms", "head"; what is none of these, "other". Their
/// squares' sum is that of the whole gradient's norm. The same on every rank. Collective.
std::vector<std::pair<std::string, double>> gradient_norms(
    const std::vector<anabranch::ParallelParameter>& parameters,
    const anabranch::ParallelGroups& groups);

}  // namespace train_lm
