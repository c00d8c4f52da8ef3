#pragma once

#include <anabranch/parameters.h>

#include <cstdint>

namespace anabranch {

/// The rank of the world that has a row of an expert's `tensor`: that of the local place of a rank of the expert-parallel
/// group; of group number `group`, where each has its own and it does not lie over the replicas (`owner`).
int64_t holder_of(const ParallelParameter& tensor, const ExpertPlacement& placement,
                  int64_t expert_rank, int64_t local, int64_t group, const ParallelGroups& groups);

}  // namespace anabranch
