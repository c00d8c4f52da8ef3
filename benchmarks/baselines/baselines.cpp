#include "baselines/baselines.h"

#include "baselines/block_sparse_engine.h"
#include "baselines/padded_engines.h"
#include "baselines/torch_engine.h"
#include "gemm/cublas/cublas_engines.h"
#include "gemm/engines.h"

namespace anabranch {
namespace {

bool anywhere(torch::Device device) { return device.is_cpu() || runs_cublas(device); }

const std::vector<EngineEntry>& baselines() {
  static const std::vector<EngineEntry> entries = {
      {"padded_bmm", anywhere, [](torch::Device) { return make_padded_bmm_engine(); }, false},
      {"block_diagonal", anywhere, [](torch::Device) { return make_block_diagonal_engine(); },
       false},
      {"block_sparse", anywhere, [](torch::Device) { return make_block_sparse_engine(128); },
       false},
      {"block_sparse_64", anywhere, [](torch::Device) { return make_block_sparse_engine(64); },
       false},
      {"block_sparse_32", anywhere, [](torch::Device) { return make_block_sparse_engine(32); },
       false},
      {"torch_grouped_mm", anywhere, make_torch_engine, false},
  };
  return entries;
}

[[maybe_unused]] const bool registered = [] {
  for (const EngineEntry& entry : baselines()) {
    register_engine(entry);
  }
  return true;
}();

}  // namespace

std::vector<std::string> baseline_engine_names() {
  std::vector<std::string> names;
  for (const EngineEntry& entry : baselines()) {
    names.push_back(entry.name);
  }
  return names;
}

}  // namespace anabranch
