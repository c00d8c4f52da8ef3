#pragma once

#include "kernels/cuda/launch.h"

// Launchers of gate.cu: see launch.h.

namespace anabranch::cuda {

/// `parts`: four of them. See GateKernels::split.
void launch_split(const float* x, int64_t m, int64_t n, const int* parts, bool side_by_side,
                  void* out, cudaStream_t stream);

/// `order`: three of them; `count`: elements of a place; `rest` may be null. See GateKernels::sum_split.
void launch_sum_split(const float* pieces, int64_t num_pieces, const float* rest, int64_t count,
                      const int* order, float* out, cudaStream_t stream);

/// See GateKernels::sum_parts.
void launch_sum_parts(const float* parts, int64_t m, int64_t n, float* out, cudaStream_t stream);

}  // namespace anabranch::cuda
