#pragma once

#include "kernels/cuda/launch.h"

// Launchers of gate.cu: see launch.h.

namespace anabranch::cuda {

/// `parts`: three of them. See GateKernels::split.
void launch_split(const float* x, int64_t m, int64_t n, const int* parts, bool side_by_side,
                  void* out, cudaStream_t stream);

}  // namespace anabranch::cuda
