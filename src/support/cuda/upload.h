#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace anabranch {

/// Writes `values` [count] to `target` on the device, in the order of `stream`. They travel as
/// kernel parameters: no pinned memory, no wait, and no copy engine to switch to and from.
void launch_upload(const int64_t* values, int64_t count, int64_t* target, cudaStream_t stream);

}  // namespace anabranch
