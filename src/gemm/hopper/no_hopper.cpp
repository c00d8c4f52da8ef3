#include <anabranch/error.h>

#include "gemm/hopper/hopper_engine.h"

// Built in the place of hopper_engine.cpp where there is no CUDA.
namespace anabranch {

bool runs_hopper(torch::Device /*device*/) { return false; }

std::shared_ptr<GroupedGemmEngine> make_hopper_engine() {
  throw NotBuiltError("this build of anabranch has no kernels for a GPU");
}

}  // namespace anabranch
