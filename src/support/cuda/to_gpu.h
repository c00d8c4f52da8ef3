#pragma once

#include <torch/types.h>

#include <vector>

namespace anabranch {

/// `values` in the memory of a GPU, in the order of its current stream and without waiting for it. Throws
/// NotBuiltError in a build without CUDA.
torch::Tensor to_gpu(const std::vector<int64_t>& values, torch::Device device);

}  // namespace anabranch
