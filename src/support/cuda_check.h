#pragma once

#include <cuda_runtime_api.h>

#include <source_location>
#include <stdexcept>
#include <string>

namespace anabranch {

/// Throws std::runtime_error with the call, the cause and the place if a CUDA call failed.
inline void check_cuda(cudaError_t status, const char* call,
                       std::source_location place = std::source_location::current()) {
  if (status != cudaSuccess) [[unlikely]] {
    throw std::runtime_error(std::string(call) + " failed: " + cudaGetErrorString(status) + " (" +
                             cudaGetErrorName(status) + ") at " + place.file_name() + ":" +
                             std::to_string(place.line()));
  }
}

/// To be called after every kernel launch.
inline void check_launch(const char* kernel,
                         std::source_location place = std::source_location::current()) {
  check_cuda(cudaGetLastError(), kernel, place);
}

}  // namespace anabranch
