#include "baselines/padded_engines.h"

#include <ATen/ops/bmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <numeric>

namespace anabranch {
namespace {

/// Rows that every expert is padded to: a multiple of `multiple`.
int64_t padded_height(const std::vector<int64_t>& counts, int64_t multiple) {
  const int64_t largest = counts.empty() ? 0 : *std::max_element(counts.begin(), counts.end());
  return (largest + multiple - 1) / multiple * multiple;
}

/// Rows grouped by expert, every expert's followed by zeros up to the same height; and back. Both ways
/// experts stay whole: large copies.
class Padding {
 public:
  Padding(const std::vector<int64_t>& counts, int64_t multiple)
      : counts_(counts), height_(padded_height(counts, multiple)) {}

  /// [P, width] → [experts, height, width].
  torch::Tensor pad(const torch::Tensor& rows) const {
    const int64_t least = *std::min_element(counts_.begin(), counts_.end());
    const torch::Tensor zeros = at::zeros({height_ - least, rows.size(1)}, rows.options());
    std::vector<torch::Tensor> parts;
    int64_t first_row = 0;
    for (const int64_t count : counts_) {
      parts.push_back(rows.narrow(0, first_row, count));
      parts.push_back(zeros.narrow(0, 0, height_ - count));
      first_row += count;
    }
    return at::cat(parts).view({experts(), height_, rows.size(1)});
  }
  /// And back.
  void unpad(const torch::Tensor& padded, torch::Tensor& rows) const {
    std::vector<torch::Tensor> parts;
    for (int64_t e = 0; e < experts(); ++e) {
      parts.push_back(padded.select(0, e).narrow(0, 0, counts_[e]));
    }
    at::cat_out(rows, parts);
  }
  /// For results of that width.
  torch::Tensor empty(const torch::Tensor& like, int64_t width) const {
    return at::empty({experts(), height_, width}, like.options());
  }

 private:
  int64_t experts() const { return static_cast<int64_t>(counts_.size()); }

  const std::vector<int64_t>& counts_;
  int64_t height_;
};

class PaddedEngine : public GroupedGemmEngine {
 public:
  explicit PaddedEngine(int64_t multiple) : multiple_(multiple) {}

  int64_t padding_rows(const ExpertCounts& counts) const override {
    return counts.experts() * padded_height(counts.on_host(), multiple_) - counts.rows();
  }

 protected:
  void do_forward(const torch::Tensor& x, const torch::Tensor& weight, const ExpertCounts& counts,
                  torch::Tensor& y) override {
    multiply_rows(x, weight.transpose(1, 2), counts, y);
  }
  void do_dgrad(const torch::Tensor& dy, const torch::Tensor& weight, const ExpertCounts& counts,
                torch::Tensor& dx) override {
    multiply_rows(dy, weight, counts, dx);
  }
  void do_wgrad(const torch::Tensor& dy, const torch::Tensor& x, const ExpertCounts& counts,
                torch::Tensor& dweight) override {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    if (dy.size(0) == 0) {
      dweight.zero_();
      return;
    }
    const Padding padding(counts.on_host(), multiple_);
    multiply(padding.pad(dy).transpose(1, 2), padding.pad(x), dweight);
  }

  /// c[e] = a[e] · b[e] for every expert.
  virtual void multiply(const torch::Tensor& a, const torch::Tensor& b, torch::Tensor& c) const = 0;

 private:
  void multiply_rows(const torch::Tensor& rows, const torch::Tensor& weight,
                     const ExpertCounts& counts, torch::Tensor& out) const {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    if (rows.size(0) == 0) {
      return;
    }
    const Padding padding(counts.on_host(), multiple_);
    torch::Tensor padded = padding.empty(rows, out.size(1));
    multiply(padding.pad(rows), weight, padded);
    padding.unpad(padded, out);
  }

  int64_t multiple_;
};

class PaddedBmm final : public PaddedEngine {
 public:
  PaddedBmm() : PaddedEngine(1) {}
  std::string name() const override { return "padded_bmm"; }

 protected:
  void multiply(const torch::Tensor& a, const torch::Tensor& b, torch::Tensor& c) const override {
    at::bmm_out(c, a, b);
  }
};

/// Rows of a block of a block-sparse matrix, as the article's. And above 8192, sums over uneven numbers
/// of rows may lose some of them in cuBLAS 13.1.
constexpr int64_t kBlock = 128;

class BlockDiagonal final : public PaddedEngine {
 public:
  BlockDiagonal() : PaddedEngine(kBlock) {}
  std::string name() const override { return "block_diagonal"; }

 protected:
  void multiply(const torch::Tensor& a, const torch::Tensor& b, torch::Tensor& c) const override {
    for (int64_t e = 0; e < c.size(0); ++e) {
      torch::Tensor block = c.select(0, e);
      at::mm_out(block, a.select(0, e), b.select(0, e));
    }
  }
};

}  // namespace

std::shared_ptr<GroupedGemmEngine> make_padded_bmm_engine() {
  return std::make_shared<PaddedBmm>();
}

std::shared_ptr<GroupedGemmEngine> make_block_diagonal_engine() {
  return std::make_shared<BlockDiagonal>();
}

}  // namespace anabranch
