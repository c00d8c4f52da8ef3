#pragma once

#include <cuda_runtime_api.h>

#include "gemm/tiles/problem.h"
#include "gemm/tiles/task.h"

namespace anabranch::ampere {

/// An operand, whose rows are read by the index where there is one.
struct Source {
  const void* data;
  const int64_t* index = nullptr;
};

/// The products of `problem` on the current device, in the order of `stream`; see TileEngine::Operands.
void launch_grouped_gemm(const tiles::Task& task, const tiles::Problem& problem, const Source& a,
                         const Source& b, void* c, cudaStream_t stream);

}  // namespace anabranch::ampere
