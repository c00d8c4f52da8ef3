#pragma once

#include <torch/types.h>

#include <functional>
#include <string>

// What auto asks of a GPU. In a build without CUDA these throw NotBuiltError.

namespace anabranch {

/// Milliseconds from the first to the last of what `call` launches on the current stream of the current
/// device. Waits for it.
double gpu_milliseconds(const std::function<void()>& call);

/// The GPU and the versions that times depend on.
std::string describe_gpu(torch::Device device);

}  // namespace anabranch
