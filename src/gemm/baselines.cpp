#include "gemm/baselines.h"

#include <utility>

#include "gemm/block_sparse_engine.h"
#include "gemm/padded_engines.h"
#include "gemm/torch_engine.h"

namespace anabranch {
namespace {

using Make = std::shared_ptr<GroupedGemmEngine> (*)(torch::Device);

const std::pair<const char*, Make> kBaselines[] = {
    {"padded_bmm", [](torch::Device) { return make_padded_bmm_engine(); }},
    {"block_diagonal", [](torch::Device) { return make_block_diagonal_engine(); }},
    {"block_sparse", [](torch::Device) { return make_block_sparse_engine(128); }},
    {"block_sparse_64", [](torch::Device) { return make_block_sparse_engine(64); }},
    {"block_sparse_32", [](torch::Device) { return make_block_sparse_engine(32); }},
    {"torch_grouped_mm", [](torch::Device device) { return make_torch_engine(device); }},
};

}  // namespace

std::vector<std::string> baseline_engine_names() {
  std::vector<std::string> names;
  for (const auto& [name, make] : kBaselines) {
    names.emplace_back(name);
  }
  return names;
}

std::shared_ptr<GroupedGemmEngine> make_baseline_engine(torch::Device device,
                                                        const std::string& name) {
  for (const auto& [known, make] : kBaselines) {
    if (name == known) return make(device);
  }
  return nullptr;
}

}  // namespace anabranch
