#include <anabranch/error.h>

#include "gemm/cublas/cublas_engines.h"

// Built in the place of the engines where there is no CUDA.
namespace anabranch {
namespace {

[[noreturn]] void refuse() { throw NotBuiltError("this build of anabranch has no cuBLAS"); }

}  // namespace

bool runs_cublas(torch::Device /*device*/) { return false; }

std::shared_ptr<GroupedGemmEngine> make_cublas_loop_engine(torch::Device /*device*/,
                                                           int /*streams*/) {
  refuse();
}

std::shared_ptr<GroupedGemmEngine> make_cublas_grouped_engine(torch::Device /*device*/) {
  refuse();
}

bool runs_cublaslt_grouped(torch::Device /*device*/) { return false; }

std::shared_ptr<GroupedGemmEngine> make_cublaslt_grouped_engine(torch::Device /*device*/) {
  refuse();
}

}  // namespace anabranch
