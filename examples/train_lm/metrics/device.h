#pragma once

#include <sys/resource.h>
#include <torch/types.h>

#include <string>

namespace train_lm {

/// The GPU's name, as CUDA says it; "" for the CPU.
std::string name_of(torch::Device device);

/// Peak bytes that tensors on the GPU have taken so far.
int64_t peak_memory_of_gpu(torch::Device device);

/// The same; on the CPU, what the process has taken.
inline int64_t peak_memory(torch::Device device) {
  rusage usage = {};
  if (!device.is_cpu()) {
    return peak_memory_of_gpu(device);
  }
  getrusage(RUSAGE_SELF, &usage);  // fails for wrong arguments alone
  return int64_t{usage.ru_maxrss} * 1024;
}

}  // namespace train_lm
