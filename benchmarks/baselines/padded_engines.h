#pragma once

#include <anabranch/grouped_gemm.h>

namespace anabranch {

// Every expert is padded to the fullest with rows of zeros, which are multiplied like the others.

/// All experts in one batched product.
std::shared_ptr<GroupedGemmEngine> make_padded_bmm_engine();

/// The padded experts as equal blocks on the diagonal of one matrix, of which the products are taken
/// block row by block row. Of a multiple of 128 rows each.
std::shared_ptr<GroupedGemmEngine> make_block_diagonal_engine();

}  // namespace anabranch
