#include "support/cuda/to_gpu.h"

#include "support/cuda/device.h"

namespace anabranch {

torch::Tensor to_gpu(const std::vector<int64_t>& values, torch::Device device) {
  return upload(values, device);
}

}  // namespace anabranch
