#pragma once

#include <anabranch/grouped_gemm.h>

namespace anabranch {

/// A kernel of our own for compute capability 9.0: all experts in one launch, bf16 and fp16, sizes
/// that are multiples of 8.
std::shared_ptr<GroupedGemmEngine> make_hopper_engine();

/// Whether the device is of that kind.
bool is_hopper(torch::Device device);

}  // namespace anabranch
