#include <anabranch/error.h>

#include "support/cuda/to_gpu.h"

namespace anabranch {

torch::Tensor to_gpu(const std::vector<int64_t>& /*values*/, torch::Device /*device*/) {
  throw NotBuiltError("tensors on a GPU need a build of anabranch with CUDA (ANABRANCH_CUDA=ON)");
}

}  // namespace anabranch
