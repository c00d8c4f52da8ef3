#pragma once

#include <anabranch/error.h>
#include <cuda_runtime_api.h>

#include <source_location>
#include <string>

namespace anabranch {

/// Throws CudaError if a CUDA call failed.
inline void check_cuda(cudaError_t status, const char* call,
                       std::source_location place = std::source_location::current()) {
  if (status != cudaSuccess) [[unlikely]] {
    const std::string cause = cudaGetErrorString(status);
    throw CudaError(call, status, cause + " (" + cudaGetErrorName(status) + ")", place);
  }
}

/// To be called after every kernel launch.
inline void check_launch(const char* kernel,
                         std::source_location place = std::source_location::current()) {
  check_cuda(cudaGetLastError(), kernel, place);
}

}  // namespace anabranch
