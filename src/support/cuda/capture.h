#pragma once

#include <c10/core/Device.h>

namespace anabranch {

/// Whether the current stream of `device` is being recorded into a CUDA graph: nothing may be waited for
/// then. Never in a build without CUDA.
bool is_captured(c10::Device device);

}  // namespace anabranch
