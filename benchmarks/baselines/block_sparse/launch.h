#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "baselines/block_sparse/product.h"
#include "kernels/cuda/launch.h"

// Launchers of the device code, without LibTorch.

namespace anabranch::block_sparse {

/// A Topology's sizes and arrays on the device.
struct Layout {
  int64_t block;
  int64_t experts;
  int64_t tokens;
  int64_t width;
  int64_t block_rows;
  int64_t expert_columns;

  int64_t* first_token;
  int32_t* block_tokens;
  int32_t* row_offsets;
  int32_t* row_indices;
  int32_t* column_indices;
  int32_t* column_offsets;
  int32_t* transposed_rows;
  int32_t* transposed_order;
};

/// `counts` [experts]; `first` [2, experts + 1] is scratch.
void launch_topology(const Layout& layout, const int64_t* counts, int64_t* first,
                     cudaStream_t stream);

/// See products.h. `weight` is [experts, width, k], or [experts, k, width] if `width_last`.
struct Arguments {
  Layout layout;
  void* values;
  void* dense;
  void* weight;
  int64_t k;
  bool width_last;
};

/// bf16 and fp16.
void launch_tensor_cores(Product product, cuda::Scalar scalar, const Arguments& arguments,
                         cudaStream_t stream);
/// fp32 and fp64.
void launch_tiled(Product product, cuda::Scalar scalar, const Arguments& arguments,
                  cudaStream_t stream);

}  // namespace anabranch::block_sparse
