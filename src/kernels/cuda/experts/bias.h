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

/// As many as `rows` rows can be cut into, whichever experts' they are: an expert has one at least.
inline int64_t most_bias_chunks(int64_t rows, int64_t experts) {
  return rows / kBiasChunk + experts;
}

/// Scratch of `launch_bias_gradient`.
struct BiasScratch {
  int64_t* chunks;  ///< [experts + 1]
  unsigned* done;   ///< [experts, bias_strips]
  void* partial;    ///< [most_bias_chunks, width] of the accumulation type
};

/// `out` [experts, width] from `count` rows; `weights` may be null.
void launch_bias_gradient(Scalar scalar, const void* rows, const void* weights,
                          const int64_t* offsets, int64_t count, int64_t experts, int64_t width,
                          const BiasScratch& scratch, void* out, cudaStream_t stream);

}  // namespace anabranch::cuda
