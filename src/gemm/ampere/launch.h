#pragma once

#include <cuda_runtime_api.h>

#include "gemm/tiles/problem.h"
#include "gemm/tiles/task.h"

namespace anabranch::ampere {

/// The products of `problem` on the current device, in the order of `stream`; see TileEngine::Operands.
void launch_grouped_gemm(const tiles::Task& task, const tiles::Problem& problem, const void* a,
                         const void* b, void* c, cudaStream_t stream);

}  // namespace anabranch::ampere
