#pragma once

#include <anabranch/communicator.h>

#include <memory>
#include <string>

#include "communicator/nccl/group.h"
#include "communicator/nccl/heartbeats.h"

namespace anabranch {

/// The version of the NCCL that is loaded, as NCCL_VERSION counts: it may be another than the one
/// this was built with. Throws std::runtime_error before 2.19.
int loaded_nccl_version();
/// 22809 → "2.28.9"
std::string nccl_version_name(int version);

/// Makes the ranks of `bootstrap` an NCCL group, with the current device of each. A rank that fails,
/// or does not come within `deadline`, is named by a CommunicationError on all. Collective.
std::unique_ptr<NcclGroup> join_nccl_group(Communicator& bootstrap, NcclHeartbeats& heartbeats,
                                           std::chrono::milliseconds deadline);

/// A store for ranks that share no more than NCCL's id, on rank 0's host. Collective.
std::shared_ptr<Communicator> meet_through_nccl(const std::string& unique_id, int rank, int size,
                                                torch::Device device,
                                                const CommunicatorOptions& options);

}  // namespace anabranch
