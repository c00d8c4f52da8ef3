#pragma once

#include "kernels/cuda/launch.h"

// Launchers of rows.cu: see launch.h.

namespace anabranch::cuda {

void launch_gather_rows(const void* rows, const int64_t* index, int64_t count, int64_t row_bytes,
                        void* out, cudaStream_t stream);

void launch_scatter_rows(const void* rows, const int64_t* offsets, const int64_t* members,
                         int64_t groups, int64_t row_bytes, void* out, cudaStream_t stream);

/// `weights` may be null.
void launch_sum_rows(Scalar scalar, const void* rows, const int64_t* offsets,
                     const int64_t* members, const void* weights, int64_t groups, int64_t width,
                     void* out, cudaStream_t stream);

}  // namespace anabranch::cuda
