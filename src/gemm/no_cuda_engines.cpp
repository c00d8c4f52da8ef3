#include <stdexcept>

#include "gemm/cuda_engines.h"

// Built in the place of cuda_engines.cpp where there is no CUDA.
namespace anabranch {

std::vector<std::string> cuda_engine_names(torch::Device /*device*/) { return {}; }

std::shared_ptr<GroupedGemmEngine> make_cuda_engine(torch::Device /*device*/,
                                                    const std::string& /*name*/) {
  throw std::runtime_error(
      "grouped GEMM on a GPU needs a build of anabranch with CUDA (ANABRANCH_CUDA=ON)");
}

}  // namespace anabranch
