#pragma once

#include "baselines/block_sparse/products.h"

// The GPU's half; in a build without CUDA these throw NotBuiltError.

namespace anabranch::block_sparse {

/// Fills the arrays of `topology`.
void fill_on_cuda(const Topology& topology, const std::vector<int64_t>& counts);

void multiply_on_cuda(const Topology& topology, Product product, const Operands& operands);

}  // namespace anabranch::block_sparse
