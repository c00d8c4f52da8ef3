#pragma once

#include "baselines/block_sparse/product.h"
#include "baselines/block_sparse/topology.h"

// Products with the block-sparse matrix S (see topology.h), a dense one D [tokens, k], whose rows are
// the same tokens, and a dense W, whose rows or columns are S's columns. Any two give the third, and
// W may lie either way round, which makes all of MegaBlocks' products:
//
//                                   W [experts, width, k]    W [experts, k, width]
//   SDD  sparse = dense · dense     S = D · Wᵀ               S = D · W
//   DSD  dense = sparse · dense     D = S · W                D = S · Wᵀ
//   DDS  dense = dense · sparse     W = Sᵀ · D  (DSᵀD)       W = Dᵀ · S  (DDS)
//
// Tokens are always rows in memory. The remaining forms, whose tokens would be columns, are these
// read the other way round: W · Sᵀ = (S · Wᵀ)ᵀ.

namespace anabranch::block_sparse {

/// One type and device, contiguous; the product's result is written whole. Sums in fp32 (fp64).
struct Operands {
  torch::Tensor values;     ///< S: [tokens, width]
  torch::Tensor dense;      ///< D: [tokens, k]
  torch::Tensor weight;     ///< W: [experts, width, k], or [experts, k, width]
  bool width_last = false;  ///< whether W is [experts, k, width]

  int64_t k() const { return dense.size(1); }
};

void multiply(const Topology& topology, Product product, const Operands& operands);

}  // namespace anabranch::block_sparse
