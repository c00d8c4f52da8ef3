#include "gemm/baselines.h"

#include "gemm/block_sparse_engine.h"

namespace anabranch {

std::vector<std::string> baseline_engine_names(torch::Device /*device*/) {
  return {"block_sparse", "block_sparse_64", "block_sparse_32"};
}

std::shared_ptr<GroupedGemmEngine> make_baseline_engine(torch::Device /*device*/,
                                                        const std::string& name) {
  for (const int64_t block : {128, 64, 32}) {
    auto engine = make_block_sparse_engine(block);
    if (engine->name() == name) {
      return engine;
    }
  }
  return nullptr;
}

}  // namespace anabranch
