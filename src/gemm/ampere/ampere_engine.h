#pragma once

#include <anabranch/grouped_gemm.h>

namespace anabranch {

/// Whether the device is of compute capability 8.0 or newer; none is in a build without CUDA, in which the engine
/// cannot be made.
bool runs_ampere(torch::Device device);

/// A kernel of our own for all of them: all experts in one launch, bf16 and fp16, sizes that are multiples of 8.
std::shared_ptr<GroupedGemmEngine> make_ampere_engine();

}  // namespace anabranch
