#pragma once

#include <cublas_v2.h>
#include <cuda_runtime_api.h>

#include <string>
#include <utility>

#include "support/cuda/check.h"

namespace anabranch {

/// Throws CudaError if a cuBLAS call failed.
inline void check_cublas(cublasStatus_t status, const char* call,
                         std::source_location place = std::source_location::current()) {
  if (status != CUBLAS_STATUS_SUCCESS) [[unlikely]] {
    throw CudaError(call, status,
                    std::string(cublasGetStatusName(status)) + ": " + cublasGetStatusString(status),
                    place);
  }
}

/// One owner of a foreign handle. Its destruction cannot throw: `destroy`'s result is ignored, as it
/// must be for a program whose CUDA context is already gone.
template <typename handle_t, auto destroy>
class UniqueHandle {
 public:
  explicit UniqueHandle(handle_t handle) noexcept : handle_(handle) {}
  UniqueHandle(UniqueHandle&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  UniqueHandle& operator=(UniqueHandle&&) = delete;
  ~UniqueHandle() {
    if (handle_ != nullptr) {
      static_cast<void>(destroy(handle_));
    }
  }
  operator handle_t() const noexcept { return handle_; }

 private:
  handle_t handle_;
};

using CudaStream = UniqueHandle<cudaStream_t, cudaStreamDestroy>;
using CudaEvent = UniqueHandle<cudaEvent_t, cudaEventDestroy>;
using CublasHandle = UniqueHandle<cublasHandle_t, cublasDestroy>;

/// Of the current device; not ordered with the default stream.
inline CudaStream make_cuda_stream() {
  cudaStream_t stream = nullptr;
  check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking),
             "cudaStreamCreateWithFlags");
  return CudaStream(stream);
}

/// For ordering only: keeps no time.
inline CudaEvent make_cuda_event() {
  cudaEvent_t event = nullptr;
  check_cuda(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreateWithFlags");
  return CudaEvent(event);
}

/// Whether what the stream is given is recorded into a graph.
inline bool is_recorded(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_cuda(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

inline CublasHandle make_cublas_handle() {
  cublasHandle_t handle = nullptr;
  check_cublas(cublasCreate(&handle), "cublasCreate");
  return CublasHandle(handle);
}

}  // namespace anabranch
