#include <anabranch/error.h>

#include "baselines/block_sparse/cuda.h"

// Built in the place of cuda.cpp where there is no CUDA.
namespace anabranch::block_sparse {
namespace {

[[noreturn]] void refuse() {
  throw NotBuiltError(
      "block-sparse products on a GPU need a build of anabranch with CUDA (ANABRANCH_CUDA=ON)");
}

}  // namespace

void fill_on_cuda(const Topology& /*topology*/, const std::vector<int64_t>& /*counts*/) {
  refuse();
}

void multiply_on_cuda(const Topology& /*topology*/, Product /*product*/,
                      const Operands& /*operands*/) {
  refuse();
}

}  // namespace anabranch::block_sparse
