#pragma once

#include <cuda.h>

#include "baselines/block_sparse/launch.h"

namespace anabranch::block_sparse {

/// Of S and D as rows of tokens, of W as a weight: see gemm/hopper/tensor_map.h.
struct HopperMaps {
  CUtensorMap values;
  CUtensorMap dense;
  CUtensorMap weight;
};

/// Blocks of 128, bf16 or fp16, on compute capability 9.0.
void launch_hopper(Product product, cuda::Scalar scalar, const HopperMaps& maps,
                   const Arguments& arguments, cudaStream_t stream);

}  // namespace anabranch::block_sparse
