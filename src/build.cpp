#include <ATen/Context.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <anabranch/build.h>
#include <c10/util/StringUtil.h>
#include <torch/version.h>

#include "communicator/describe.h"

namespace anabranch {
namespace {

std::string describe_gpus() {
  if (!at::hasCUDA()) {
    return "GPUs: none (no driver, or LibTorch was built or linked without CUDA)";
  }
  const auto& hooks = at::detail::getCUDAHooks();
  const long runtime = hooks.versionCUDART();
  return c10::str("GPUs: ", static_cast<int>(hooks.deviceCount()), ", CUDA runtime ",
                  runtime / 1000, '.', runtime % 1000 / 10);
}

}  // namespace

std::string describe_build() {
  return c10::str("LibTorch ", TORCH_VERSION, '\n', describe_gpus(), '\n', describe_nccl(), '\n',
                  describe_mpi(), '\n');
}

}  // namespace anabranch
