#pragma once

#include <cuda_runtime_api.h>

#include <vector>

#include "support/cuda/handle.h"

namespace anabranch {

/// A stream beside the caller's, and the event by which it says that it is done.
struct SideBranch {
  cudaStream_t stream;
  cudaEvent_t done;
};

/// Work on several streams between two points of the caller's. What the branches write is the caller's
/// again when this ends, however it ends: also where an exception cuts the work short, the caller's stream
/// comes behind what has been launched, so that the memory may be given to others in its order.
class Fork {
 public:
  /// `begun` is recorded on the caller's stream.
  Fork(cudaStream_t callers, cudaEvent_t begun) : callers_(callers), begun_(begun) {
    check_cuda(cudaEventRecord(begun_, callers_), "cudaEventRecord");
  }
  Fork(const Fork&) = delete;
  Fork& operator=(const Fork&) = delete;
  ~Fork() {
    for (const SideBranch& branch : branches_) {
      if (cudaEventRecord(branch.done, branch.stream) != cudaSuccess ||
          cudaStreamWaitEvent(callers_, branch.done) != cudaSuccess) {
        static_cast<void>(cudaStreamSynchronize(branch.stream));
      }
    }
  }

  /// The branch comes behind what the caller's stream has been given so far.
  void to(const SideBranch& branch) {
    branches_.push_back(branch);
    check_cuda(cudaStreamWaitEvent(branch.stream, begun_), "cudaStreamWaitEvent");
  }
  /// The caller's stream comes behind the branches.
  void join() {
    while (!branches_.empty()) {
      const SideBranch& branch = branches_.back();
      check_cuda(cudaEventRecord(branch.done, branch.stream), "cudaEventRecord");
      check_cuda(cudaStreamWaitEvent(callers_, branch.done), "cudaStreamWaitEvent");
      branches_.pop_back();
    }
  }

 private:
  cudaStream_t callers_;
  cudaEvent_t begun_;
  std::vector<SideBranch> branches_;  // that the caller's stream does not come behind yet
};

}  // namespace anabranch
