#pragma once

#include <anabranch/grouped_gemm.h>

namespace anabranch {

/// Names of the engines that "auto" chooses from on a GPU, best guess first; none in a build without
/// CUDA.
std::vector<std::string> cuda_engine_names(torch::Device device);

/// `name`: one of `cuda_engine_names`, or "auto". Throws std::runtime_error in a build without CUDA.
std::shared_ptr<GroupedGemmEngine> make_cuda_engine(torch::Device device, const std::string& name);

}  // namespace anabranch
