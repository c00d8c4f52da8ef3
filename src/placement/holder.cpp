#include "placement/holder.h"

namespace anabranch {

int64_t holder_of(const ParallelParameter& tensor, const ExpertPlacement& placement,
                  int64_t expert_rank, int64_t local, int64_t group, const ParallelGroups& groups) {
  if (tensor.owner >= 0) {
    const ExpertPlacement shares{placement.local_experts(expert_rank),
                                 groups.expert_replicas->size()};
    group = shares.rank_of(local);
  }
  return group * groups.expert_parallel->size() + expert_rank;
}

}  // namespace anabranch
