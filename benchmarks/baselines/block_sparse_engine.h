#pragma once

#include <anabranch/grouped_gemm.h>

namespace anabranch {

/// The method of MegaBlocks: products with a block-sparse matrix [P, experts · n], whose topology is
/// built anew for each; see block_sparse/topology.h. Its CPU version is for tests.
std::shared_ptr<GroupedGemmEngine> make_block_sparse_engine(int64_t block);

}  // namespace anabranch
