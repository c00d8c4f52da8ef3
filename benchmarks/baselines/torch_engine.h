#pragma once

#include <anabranch/grouped_gemm.h>

namespace anabranch {

/// LibTorch's own grouped product: bf16 on a GPU; fp32, bf16 and fp16 on the CPU. It returns its
/// result, which is copied to where the caller wants it.
std::shared_ptr<GroupedGemmEngine> make_torch_engine(torch::Device device);

}  // namespace anabranch
