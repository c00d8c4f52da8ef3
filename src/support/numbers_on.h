#pragma once

#include <ATen/ops/tensor.h>

#include <vector>

namespace anabranch {

/// [k] int64 on that device.
inline torch::Tensor numbers_on(torch::Device device, const std::vector<int64_t>& numbers) {
  return at::tensor(numbers, at::kLong).to(device);
}

}  // namespace anabranch
