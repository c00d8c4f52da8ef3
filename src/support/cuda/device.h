#pragma once

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/types.h>

#include <vector>

#include "support/cuda/upload.h"

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

/// `values` on the device, in the order of its current stream and without waiting for it.
inline torch::Tensor upload(const std::vector<int64_t>& values, torch::Device device) {
  const OnDevice stream(device);
  const auto size = static_cast<int64_t>(values.size());
  torch::Tensor target = at::empty({size}, at::TensorOptions(device).dtype(torch::kInt64));
  launch_upload(values.data(), size, target.data_ptr<int64_t>(), stream);
  return target;
}

}  // namespace anabranch
