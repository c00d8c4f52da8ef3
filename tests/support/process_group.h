#pragma once

#include <anabranch/communicator.h>
#include <c10/util/intrusive_ptr.h>

#include <chrono>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

namespace anabranch::test {

/// A store that all ranks of `harness` share, kept by rank 0. Collective.
c10::intrusive_ptr<c10d::Store> open_shared_store(Communicator& harness,
                                                  std::chrono::milliseconds deadline);

/// A process group of the ranks of `harness`: gloo for host memory and, where the tests run on a GPU
/// and this is a build with NCCL, torch's NCCL for it. Collective.
c10::intrusive_ptr<c10d::ProcessGroup> make_process_group(Communicator& harness,
                                                          std::chrono::milliseconds deadline);

}  // namespace anabranch::test
