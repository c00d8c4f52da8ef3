#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDACachingAllocator.h>

#include "metrics/device.h"

namespace train_lm {

std::string name_of(torch::Device device) {
  return device.is_cpu() ? "" : at::cuda::getDeviceProperties(device.index())->name;
}

int64_t peak_memory_of_gpu(torch::Device device) {
  return c10::cuda::CUDACachingAllocator::getDeviceStats(device.index()).allocated_bytes[0].peak;
}

}  // namespace train_lm
