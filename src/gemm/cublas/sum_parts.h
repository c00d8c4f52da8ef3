#pragma once

#include <cuda_runtime_api.h>

#include "kernels/cuda/launch.h"

namespace anabranch {

/// out [size] = the sum of `parts` [count, size], in order, or out += that sum. Parts are of fp32
/// (fp64 for fp64).
void launch_sum_parts(cuda::Scalar scalar, const void* parts, int64_t count, int64_t size,
                      bool accumulate, void* out, cudaStream_t stream);

}  // namespace anabranch
