#pragma once

#include <torch/types.h>

#include <cstdint>
#include <vector>

// The block-sparse matrix S [tokens, experts · width] of MegaBlocks (Gale et al. 2022,
// arXiv:2211.15841): an expert's tokens meet its own columns alone, all else is zero and not stored.
//
//            expert 0   expert 1   expert 2          one cell: block x block elements
//   tokens  [ 0  1  2                     ]  row 0   the numbers count the blocks by rows: where
//   of 0    [ 3  4  5                     ]  row 1   they lie in the BCSR arrays
//   of 2    [                      6  7  8]  row 2
//
// Each expert begins a block row and a block column of its own. Its last block row holds its last
// tokens, so at most block − 1 rows of padding an expert are multiplied; none is stored: the values
// are a matrix [tokens, width] in which a block row's blocks lie side by side. So block i of block
// row r has the rows first_token[r] .. + block_tokens[r] − 1 and the columns from
// (i − row_offsets[r]) · block, as far as the width goes.

namespace anabranch::block_sparse {

/// Indices are of int32 and lie on the topology's device, as all tensors do.
struct Topology {
  int64_t block;           ///< rows and columns of a block: 128, 64 or 32
  int64_t experts;         ///
  int64_t tokens;          ///< rows of S
  int64_t width;           ///< columns of an expert
  int64_t block_rows;      ///< Σ ⌈counts / block⌉
  int64_t expert_columns;  ///< block columns of an expert, ⌈width / block⌉

  torch::Tensor first_token;   ///< [block_rows] int64
  torch::Tensor block_tokens;  ///< [block_rows]: 1 .. block

  // Row by row (BCSR), with the row of each block besides (BCOO).
  torch::Tensor row_offsets;     ///< [block_rows + 1]: first block of each block row
  torch::Tensor row_indices;     ///< [blocks]
  torch::Tensor column_indices;  ///< [blocks]

  // The same blocks column by column (BCSC): what Sᵀ is read by, in place of a transposed copy.
  torch::Tensor column_offsets;    ///< [block_columns + 1]
  torch::Tensor transposed_rows;   ///< [blocks]: block row
  torch::Tensor transposed_order;  ///< [blocks]: place in the row by row order

  int64_t blocks() const { return block_rows * expert_columns; }
  int64_t block_columns() const { return experts * expert_columns; }
};

/// Made on `device` from counts [experts] ≥ 0, without waiting for it.
Topology build_topology(const std::vector<int64_t>& counts, int64_t width, int64_t block,
                        torch::Device device);

}  // namespace anabranch::block_sparse
