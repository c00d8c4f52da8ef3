#pragma once

#include <anabranch/grouped_gemm.h>

namespace anabranch {

/// Whether the device is of compute capability 9.0; none is in a build without CUDA, in which the
/// engine cannot be made.
bool runs_hopper(torch::Device device);

/// A kernel of our own for that capability: all experts in one launch, bf16 and fp16, sizes that are
/// multiples of 8.
std::shared_ptr<GroupedGemmEngine> make_hopper_engine();

}  // namespace anabranch
