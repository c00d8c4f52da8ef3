#pragma once

#include <cuda_runtime_api.h>

#include "gemm/hopper/maps.h"
#include "gemm/tiles/task.h"

namespace anabranch::hopper {

/// The products of `problem`, whose experts have `rows` rows together, on the current device, in the
/// order of `stream`.
void launch_grouped_gemm(const Task& task, const Maps& maps, const Problem& problem, int64_t rows,
                         cudaStream_t stream);

}  // namespace anabranch::hopper
