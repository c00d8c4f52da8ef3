#pragma once

#include <anabranch/parameters.h>

#include <cstdint>
#include <vector>

namespace anabranch {

/// An expert's part of a tensor, as a checkpoint has it: whole, however the ranks hold it.
struct StoredExpert {
  int64_t expert;
  int64_t writer;        ///< rank of the world
  torch::Tensor tensor;  ///< of the writer alone
};

/// The experts of `tensor`, the same on all ranks, each with a rank that holds it: of the first group of
/// expert-parallel ranks, or the one that has its state where that is sharded over the replicas. Slices are brought
/// to the rank of the first of them: collective over the world where there are any.
std::vector<StoredExpert> stored_experts(const ParallelParameter& tensor,
                                         const ParallelGroups& groups);

}  // namespace anabranch
