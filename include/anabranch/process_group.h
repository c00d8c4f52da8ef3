#pragma once

#include <anabranch/communicator.h>
#include <c10/util/intrusive_ptr.h>

#include <memory>

namespace c10d {
class ProcessGroup;
}

namespace anabranch {

/// The ranks of a process group that the program already has: torch.distributed's, or one made by
/// <torch/csrc/distributed/c10d/ProcessGroup.hpp>. Collective over the group.
///
/// Tensors in host memory go through the group's backend for the CPU (gloo), tensors on this rank's
/// GPU through NCCL, on the caller's current stream; where the group has only one of the two, the
/// other memory is copied to it and back. The GPU is the one that the group is bound to, else the
/// current device. Rows move by sends and receives alone, so groups split from this one need no
/// further process group; other uses of the group in between are fine.
///
/// Between host memories the deadline holds and the error names the peer. On a GPU NCCL does not know
/// whom it waits for, and the group's own timeout holds (init_process_group(timeout=...)), with what
/// torch does when it has passed: `check` throws once torch has noticed, if the process still lives.
///
/// Throws InputError if there is no group, or none of its backends moves tensors of the CPU or CUDA.
std::shared_ptr<Communicator> make_process_group_communicator(
    c10::intrusive_ptr<c10d::ProcessGroup> group, const CommunicatorOptions& options = {});

}  // namespace anabranch
