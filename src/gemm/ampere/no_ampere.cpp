#include <anabranch/error.h>

#include "gemm/ampere/ampere_engine.h"

// Built in the place of ampere_engine.cpp where there is no CUDA.
namespace anabranch {

bool runs_ampere(torch::Device /*device*/) { return false; }

std::shared_ptr<GroupedGemmEngine> make_ampere_engine() {
  throw NotBuiltError("this build of anabranch has no kernels for a GPU");
}

}  // namespace anabranch
