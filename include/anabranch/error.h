#pragma once

#include <source_location>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace anabranch {

/// Wrong input: says what was given and what was expected. Thrown before any row is exchanged.
class InputError : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

/// A collective did not complete: a peer died, stalled, or runs with other options.
class CommunicationError : public std::runtime_error {
 public:
  CommunicationError(const std::string& message, std::vector<int> peers)
      : std::runtime_error(message), peers_(std::move(peers)) {}

  /// Ranks, within the communicator of the failed call, that the failure is laid to. Empty where the
  /// cause lies outside it; the message then names the rank of the world.
  const std::vector<int>& peers() const noexcept { return peers_; }

 private:
  std::vector<int> peers_;
};

/// A step would have brought a rank more than MoEOptions::receive_capacity has room for.
class CapacityError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// A call into another library failed: which, with what code of that library's, and where.
class ForeignCallError : public std::runtime_error {
 public:
  ForeignCallError(const std::string& call, int code, const std::string& cause,
                   const std::source_location& place)
      : std::runtime_error(call + " failed: " + cause + " at " + place.file_name() + ":" +
                           std::to_string(place.line())),
        call_(call),
        code_(code) {}

  /// "cudaMemcpyAsync"
  const std::string& call() const noexcept { return call_; }
  int code() const noexcept { return code_; }

 private:
  std::string call_;
  int code_;
};

/// Of CUDA's runtime or driver, or cuBLAS; the code is a cudaError_t, CUresult or cublasStatus_t.
class CudaError : public ForeignCallError {
 public:
  using ForeignCallError::ForeignCallError;
};

/// The code is an ncclResult_t.
class NcclError : public ForeignCallError {
 public:
  using ForeignCallError::ForeignCallError;
};

/// This build of anabranch lacks what was asked for: CUDA, MPI or NCCL.
class NotBuiltError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// A checkpoint is missing, truncated, corrupt, foreign, or does not fit the model.
class CheckpointError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace anabranch
