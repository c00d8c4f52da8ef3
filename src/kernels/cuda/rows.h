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

constexpr int kMostSpoilt = 8;
struct Spoilt {
  void* tensors[kMostSpoilt];
  int64_t bytes[kMostSpoilt];  ///< whole numbers of a floating type
  int count;
};
/// Sets all bits of all of them if *spoilt is not 0: that is NaN in all types.
void launch_spoil(const Spoilt& numbers, const int64_t* spoilt, cudaStream_t stream);

}  // namespace anabranch::cuda
