#pragma once

#include <cuda_runtime_api.h>

#include "gemm/hopper/problem.h"
#include "gemm/hopper/task.h"

namespace anabranch::hopper {

/// The products of `problem` on the current device, in the order of `stream`.
void launch_grouped_gemm(const Task& task, const Maps& maps, const Problem& problem,
                         cudaStream_t stream);

}  // namespace anabranch::hopper
