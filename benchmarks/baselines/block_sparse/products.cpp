#include "baselines/block_sparse/products.h"

#include <ATen/OpMathType.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/zeros.h>

#include "baselines/block_sparse/cuda.h"

namespace anabranch::block_sparse {
namespace {

/// The operands block by block, on the CPU.
class Blocks {
 public:
  Blocks(const Topology& topology, const Operands& operands)
      : topology_(topology),
        values_(operands.values),
        dense_(operands.dense),
        weight_(operands.width_last ? operands.weight.transpose(1, 2) : operands.weight),
        sums_(operands.dense.options().dtype(at::toOpMathType(operands.dense.scalar_type()))) {}

  torch::Tensor values(int64_t block) const {
    const int64_t row = at(topology_.row_indices, block);
    const int64_t start = (block - at(topology_.row_offsets, row)) * topology_.block;
    return tokens(values_, row)
        .narrow(1, start, std::min(topology_.block, topology_.width - start));
  }
  torch::Tensor dense(int64_t row) const { return tokens(dense_, row); }
  /// Of a block column: [columns, k].
  torch::Tensor weight(int64_t column) const {
    const int64_t start = column % topology_.expert_columns * topology_.block;
    return weight_.select(0, column / topology_.expert_columns)
        .narrow(0, start, std::min(topology_.block, topology_.width - start));
  }
  torch::Tensor widened(const torch::Tensor& part) const { return part.to(sums_.dtype()); }
  torch::Tensor zeros_like(const torch::Tensor& part) const {
    return at::zeros(part.sizes(), sums_);
  }
  static int64_t at(const torch::Tensor& indices, int64_t i) {
    return indices.const_data_ptr<int32_t>()[i];
  }

 private:
  torch::Tensor tokens(const torch::Tensor& rows, int64_t row) const {
    return rows.narrow(0, topology_.first_token.const_data_ptr<int64_t>()[row],
                       at(topology_.block_tokens, row));
  }

  const Topology& topology_;
  torch::Tensor values_;
  torch::Tensor dense_;
  torch::Tensor weight_;
  torch::TensorOptions sums_;
};

void sdd(const Topology& topology, const Blocks& blocks) {
  for (int64_t i = 0; i < topology.blocks(); ++i) {
    const auto dense = blocks.dense(Blocks::at(topology.row_indices, i));
    const auto weight = blocks.weight(Blocks::at(topology.column_indices, i));
    blocks.values(i).copy_(at::matmul(blocks.widened(dense), blocks.widened(weight).t()));
  }
}

void dsd(const Topology& topology, const Blocks& blocks) {
  for (int64_t row = 0; row < topology.block_rows; ++row) {
    auto sum = blocks.zeros_like(blocks.dense(row));
    const int64_t end = Blocks::at(topology.row_offsets, row + 1);
    for (int64_t i = Blocks::at(topology.row_offsets, row); i < end; ++i) {
      const auto weight = blocks.weight(Blocks::at(topology.column_indices, i));
      sum.addmm_(blocks.widened(blocks.values(i)), blocks.widened(weight));
    }
    blocks.dense(row).copy_(sum);
  }
}

void dds(const Topology& topology, const Blocks& blocks) {
  for (int64_t column = 0; column < topology.block_columns(); ++column) {
    auto sum = blocks.zeros_like(blocks.weight(column));
    const int64_t end = Blocks::at(topology.column_offsets, column + 1);
    for (int64_t i = Blocks::at(topology.column_offsets, column); i < end; ++i) {
      const auto values = blocks.values(Blocks::at(topology.transposed_order, i));
      const auto dense = blocks.dense(Blocks::at(topology.transposed_rows, i));
      sum.addmm_(blocks.widened(values).t(), blocks.widened(dense));
    }
    blocks.weight(column).copy_(sum);
  }
}

}  // namespace

void multiply(const Topology& topology, Product product, const Operands& operands) {
  if (operands.dense.is_cuda()) {
    return multiply_on_cuda(topology, product, operands);
  }
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Blocks blocks(topology, operands);
  switch (product) {
    case Product::kSdd:
      return sdd(topology, blocks);
    case Product::kDsd:
      return dsd(topology, blocks);
    case Product::kDds:
      return dds(topology, blocks);
  }
}

}  // namespace anabranch::block_sparse
