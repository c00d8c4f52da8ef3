#pragma once

#include <anabranch/grouped_gemm.h>

namespace anabranch {

/// LibTorch's matrix product expert by expert, cut into pieces that all threads share.
std::shared_ptr<GroupedGemmEngine> make_cpu_engine();

}  // namespace anabranch
