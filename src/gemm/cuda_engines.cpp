#include "gemm/cuda_engines.h"

#include "gemm/auto/auto_engine.h"
#include "gemm/cublas/cublas_grouped.h"
#include "gemm/cublas/cublas_loop.h"
#include "gemm/hopper/hopper_engine.h"
#include "support/check.h"

namespace anabranch {
namespace {

constexpr int kStreams[] = {4, 1, 2, 8};

std::string loop_name(int streams) { return c10::str("cublas_loop_", streams); }

}  // namespace

std::vector<std::string> cuda_engine_names(torch::Device device) {
  std::vector<std::string> names;
  if (is_hopper(device)) {
    names.emplace_back("hopper");
  }
  for (const int streams : kStreams) {
    names.push_back(loop_name(streams));
  }
  names.emplace_back("cublas_grouped");
  return names;
}

std::shared_ptr<GroupedGemmEngine> make_cuda_engine(torch::Device device, const std::string& name) {
  if (name == "auto") {
    return make_auto_engine(device);
  }
  if (name == "hopper" && is_hopper(device)) {
    return make_hopper_engine();
  }
  for (const int streams : kStreams) {
    if (name == loop_name(streams)) {
      return make_cublas_loop_engine(device, streams);
    }
  }
  check_input(name == "cublas_grouped", "no grouped GEMM engine for ", device, " is called \"",
              name, "\"");
  return make_cublas_grouped_engine(device);
}

}  // namespace anabranch
