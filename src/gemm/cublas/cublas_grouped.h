#pragma once

#include <anabranch/grouped_gemm.h>

namespace anabranch {

/// cublasGemmGroupedBatchedEx: all experts in one call, for many small ones.
std::shared_ptr<GroupedGemmEngine> make_cublas_grouped_engine(torch::Device device);

}  // namespace anabranch
