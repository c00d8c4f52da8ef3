#pragma once

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/types.h>

#include <algorithm>
#include <vector>

namespace anabranch {

/// Makes a tensor's device the current one as long as it lives, and knows the current stream there.
class OnDevice {
 public:
  explicit OnDevice(torch::Device device)
      : guard_(device), stream_(c10::cuda::getCurrentCUDAStream()) {}
  explicit OnDevice(const torch::Tensor& tensor) : OnDevice(tensor.device()) {}
  operator cudaStream_t() const { return stream_; }

 private:
  c10::cuda::CUDAGuard guard_;
  c10::cuda::CUDAStream stream_;
};

/// `values` on the device, in the order of the current stream and without waiting for it: LibTorch
/// keeps the pinned memory until the copy is done.
inline torch::Tensor upload(const std::vector<int64_t>& values, torch::Device device) {
  const auto size = static_cast<int64_t>(values.size());
  torch::Tensor pinned = at::empty({size}, at::TensorOptions(torch::kInt64).pinned_memory(true));
  std::copy(values.begin(), values.end(), pinned.data_ptr<int64_t>());
  return pinned.to(device, /*non_blocking=*/true);
}

}  // namespace anabranch
