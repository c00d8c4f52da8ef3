#pragma once

#include <ATen/ops/empty.h>
#include <torch/types.h>

#include <algorithm>
#include <vector>

namespace anabranch {

/// `values` on either device; on a GPU in the order of its current stream, without waiting for it.
inline torch::Tensor tensor_of(const std::vector<int64_t>& values, torch::Device device) {
  const auto size = static_cast<int64_t>(values.size());
  torch::Tensor host =
      at::empty({size}, at::TensorOptions(torch::kInt64).pinned_memory(device.is_cuda()));
  std::copy(values.begin(), values.end(), host.data_ptr<int64_t>());
  return host.to(device, /*non_blocking=*/true);
}

}  // namespace anabranch
