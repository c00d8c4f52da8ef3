#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

// Launchers of the device code: raw device pointers and sizes, no LibTorch, so that the .cu files
// compile in seconds. They run on `stream`, launch nothing for empty tensors and throw
// std::runtime_error when a launch fails. Shapes and meanings are those of the stages' headers in kernels/.

namespace anabranch::cuda {

enum class Scalar { kFloat, kDouble, kBFloat16, kHalf };
enum class ActivationKind { kGeluTanh, kGelu, kRelu, kSilu, kReluSquared, kQuickGelu };

}  // namespace anabranch::cuda
