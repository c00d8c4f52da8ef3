#pragma once

#include "kernels/cuda/launch.h"

// Launchers of bias.cu: see launch.h.

namespace anabranch::cuda {

// Expert e owns rows offsets[e] .. offsets[e+1]−1, `offsets` on the device.

void launch_add_bias(Scalar scalar, void* rows, const void* bias, const int64_t* offsets,
                     int64_t experts, int64_t count, int64_t width, cudaStream_t stream);

void launch_bias_dot(Scalar scalar, const void* rows, const void* bias, const int64_t* offsets,
                     int64_t experts, int64_t count, int64_t width, void* out, cudaStream_t stream);

/// Rows that `launch_bias_gradient` sums into one partial sum.
constexpr int64_t kBiasChunk = 512;

/// Strips of columns that `launch_bias_gradient` sums at a time.
int64_t bias_strips(Scalar scalar, const void* rows, int64_t width);

/// `chunks` [experts+1]: first chunk of each expert, whose rows are cut into pieces of kBiasChunk;
/// `partial` [chunks[experts], width] of the accumulation type is scratch, and so is `done`
/// [experts, bias_strips], of zeros. `weights` may be null. Experts without rows: not written.
void launch_bias_gradient(Scalar scalar, const void* rows, const void* weights,
                          const int64_t* offsets, const int64_t* chunks, int64_t num_chunks,
                          int64_t experts, int64_t width, unsigned* done, void* partial, void* out,
                          cudaStream_t stream);

}  // namespace anabranch::cuda
