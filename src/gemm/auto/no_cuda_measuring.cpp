#include <anabranch/error.h>

#include "gemm/auto/measuring.h"

// Built in the place of cuda_measuring.cpp where there is no CUDA.
namespace anabranch {
namespace {

[[noreturn]] void refuse() {
  throw NotBuiltError("this build of anabranch has no CUDA: it cannot measure a GPU");
}

}  // namespace

double gpu_milliseconds(const std::function<void()>& /*call*/) { refuse(); }

std::string describe_gpu(torch::Device /*device*/) { refuse(); }

}  // namespace anabranch
