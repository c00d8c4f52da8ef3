#include "baselines/block_sparse_engine.h"

#include "baselines/block_sparse/products.h"

namespace anabranch {
namespace {

using block_sparse::build_topology;
using block_sparse::multiply;
using block_sparse::Product;

class BlockSparse final : public GroupedGemmEngine {
 public:
  explicit BlockSparse(int64_t block) : block_(block) {}

  std::string name() const override {
    return block_ == 128 ? "block_sparse" : c10::str("block_sparse_", block_);
  }

  /// Tokens that the last block of each expert lacks.
  int64_t padding_rows(const ExpertCounts& counts) const override {
    int64_t padding = 0;
    for (const int64_t count : counts.on_host()) {
      padding += (count + block_ - 1) / block_ * block_ - count;
    }
    return padding;
  }

 private:
  void do_forward(const torch::Tensor& x, const torch::Tensor& weight, const ExpertCounts& counts,
                  torch::Tensor& y) override {
    multiply(build_topology(counts.on_host(), weight.size(1), block_, x.device()), Product::kSdd,
             {y, x, weight});
  }
  void do_dgrad(const torch::Tensor& dy, const torch::Tensor& weight, const ExpertCounts& counts,
                torch::Tensor& dx) override {
    multiply(build_topology(counts.on_host(), weight.size(1), block_, dy.device()), Product::kDsd,
             {dy, dx, weight});
  }
  void do_wgrad(const torch::Tensor& dy, const torch::Tensor& x, const ExpertCounts& counts,
                torch::Tensor& dweight) override {
    multiply(build_topology(counts.on_host(), dweight.size(1), block_, dy.device()), Product::kDds,
             {dy, x, dweight});
  }

  int64_t block_;
};

}  // namespace

std::shared_ptr<GroupedGemmEngine> make_block_sparse_engine(int64_t block) {
  return std::make_shared<BlockSparse>(block);
}

}  // namespace anabranch
