// The block-sparse topology against one read off a dense mask of blocks, and each product against
// dense matrices whose zero blocks are masked out.
#include <gtest/gtest.h>

#include <limits>
#include <numeric>

#include "baselines/block_sparse/products.h"
#include "support/devices.h"
#include "support/random.h"
#include "support/thrown.h"
#include "support/tolerance.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

using namespace block_sparse;
using Counts = std::vector<int64_t>;

constexpr int64_t kBlocks[] = {128, 64, 32};

Counts random_counts(Random& random, int64_t experts, int64_t largest) {
  Counts counts;
  for (int64_t e = 0; e < experts; ++e) {
    counts.push_back(random.chance(0.3) ? 0 : random.integer(1, largest));
  }
  return counts;
}

// Which expert each token belongs to, [tokens].
torch::Tensor experts_of(const Counts& counts) {
  return torch::arange(static_cast<int64_t>(counts.size()))
      .repeat_interleave(torch::tensor(counts, torch::kInt64));
}

// 1 where a token meets its own expert's columns: [tokens, experts · width] fp64.
torch::Tensor mask_of(const Counts& counts, int64_t width) {
  const auto columns = torch::arange(static_cast<int64_t>(counts.size())).repeat_interleave(width);
  return (experts_of(counts).unsqueeze(1) == columns).to(torch::kFloat64);
}

// Of values [tokens, width]: the same matrix with its zeros.
torch::Tensor with_zeros(const torch::Tensor& values, const Counts& counts) {
  return values.repeat({1, static_cast<int64_t>(counts.size())}) * mask_of(counts, values.size(1));
}

class BlockSparseTest : public ::testing::TestWithParam<torch::Device> {
 protected:
  void expect_topology(const Counts& counts, int64_t width, int64_t block);
  void expect_products(const Counts& counts, int64_t width, int64_t k, int64_t block,
                       torch::Dtype dtype);

  Random random_{test_seed()};
};
INSTANTIATE_TEST_SUITE_P(Devices, BlockSparseTest, ::testing::ValuesIn(devices()),
                         [](const auto& info) { return device_name(info.param); });

void BlockSparseTest::expect_topology(const Counts& counts, int64_t width, int64_t block) {
  SCOPED_TRACE(c10::str("counts ", c10::Join(",", counts), " width ", width, " blocks of ", block));
  const auto experts = static_cast<int64_t>(counts.size());
  const auto topology = build_topology(counts, width, block, GetParam());
  // The block rows, token by token.
  std::vector<int64_t> first_token;
  std::vector<int64_t> tokens;
  std::vector<int64_t> owner;
  int64_t token = 0;
  for (int64_t e = 0; e < experts; ++e) {
    for (int64_t i = 0; i < counts[e]; ++i, ++token) {
      if (i % block == 0) {
        first_token.push_back(token);
        tokens.push_back(0);
        owner.push_back(e);
      }
      ++tokens.back();
    }
  }
  int64_t columns = 0;
  while (columns * block < width) ++columns;
  const auto rows = static_cast<int64_t>(owner.size());
  const auto mask = torch::tensor(owner, torch::kInt64).unsqueeze(1) ==
                    torch::arange(experts).repeat_interleave(columns);
  const auto by_row = mask.nonzero();                      // (row, column)
  const auto by_column = mask.t().contiguous().nonzero();  // (column, row)
  const auto number = (mask.view({-1}).cumsum(0) - 1).view(mask.sizes());

  const auto expect_equal = [](const torch::Tensor& actual, const torch::Tensor& expected) {
    EXPECT_TRUE(torch::equal(actual.cpu().to(torch::kInt64), expected.to(torch::kInt64)))
        << actual << "\nexpected\n"
        << expected;
  };
  const auto offsets = [](const torch::Tensor& lengths) {
    return torch::cat({torch::zeros({1}, torch::kInt64), lengths.cumsum(0)});
  };
  EXPECT_EQ(topology.block_rows, rows);
  EXPECT_EQ(topology.block_columns(), experts * columns);
  EXPECT_EQ(topology.blocks(), by_row.size(0));
  expect_equal(topology.first_token, torch::tensor(first_token, torch::kInt64));
  expect_equal(topology.block_tokens, torch::tensor(tokens, torch::kInt64));
  expect_equal(topology.row_offsets, offsets(mask.sum(1)));
  expect_equal(topology.row_indices, by_row.select(1, 0));
  expect_equal(topology.column_indices, by_row.select(1, 1));
  expect_equal(topology.column_offsets, offsets(mask.sum(0)));
  expect_equal(topology.transposed_rows, by_column.select(1, 1));
  expect_equal(topology.transposed_order,
               number.index({by_column.select(1, 1), by_column.select(1, 0)}));
}

TEST_P(BlockSparseTest, TopologyIsThatOfAMask) {
  for (const int64_t block : kBlocks) {
    for (int64_t i = 0; i < effort(20); ++i) {
      const auto experts = random_.pick<int64_t>({1, 2, 7, 33, 70});
      expect_topology(random_counts(random_, experts, random_.pick<int64_t>({1, 40, 300})),
                      random_.integer(1, 400), block);
    }
    expect_topology({0, 0, 0}, 130, block);
    expect_topology({}, 130, block);
    expect_topology({0, 700, 0}, 1, block);
    expect_topology({128, 64, 32, 256}, 256, block);
    expect_topology({5, 3}, 0, block);
  }
}

void BlockSparseTest::expect_products(const Counts& counts, int64_t width, int64_t k, int64_t block,
                                      torch::Dtype dtype) {
  const auto experts = static_cast<int64_t>(counts.size());
  const auto tokens = std::accumulate(counts.begin(), counts.end(), int64_t{0});
  const auto longest = *std::max_element(counts.begin(), counts.end());
  const auto values = random_.normal({tokens, width}, dtype).to(torch::kFloat64);
  const auto dense = random_.normal({tokens, k}, dtype).to(torch::kFloat64);
  const auto weight = random_.normal({experts, width, k}, dtype).to(torch::kFloat64);
  const auto sparse = with_zeros(values, counts);
  const auto flat = weight.flatten(0, 1);
  const auto options = torch::TensorOptions(dtype).device(GetParam());
  const auto topology = build_topology(counts, width, block, GetParam());
  for (const bool width_last : {false, true}) {
    SCOPED_TRACE(c10::str("counts ", c10::Join(",", counts), " width ", width, " k ", k,
                          " blocks of ", block, " width last ", width_last, " ", to_string(dtype)));
    const auto laid = [&](const torch::Tensor& w) {
      return width_last ? w.transpose(1, 2).contiguous() : w;
    };
    const Operands operands = {values.to(options), dense.to(options), laid(weight).to(options),
                               width_last};
    const auto poisoned = [](const torch::Tensor& like) {
      return torch::full_like(like, std::numeric_limits<double>::quiet_NaN());
    };
    Operands sdd = operands;
    sdd.values = poisoned(operands.values);
    multiply(topology, Product::kSdd, sdd);
    const auto mask = mask_of(counts, width);
    EXPECT_TRUE(close(with_zeros(sdd.values.cpu().to(torch::kFloat64), counts),
                      dense.matmul(flat.t()) * mask,
                      tolerance(dtype, k, dense.abs().matmul(flat.abs().t()) * mask)));
    Operands dsd = operands;
    dsd.dense = poisoned(operands.dense);
    multiply(topology, Product::kDsd, dsd);
    EXPECT_TRUE(close(dsd.dense, sparse.matmul(flat),
                      tolerance(dtype, width, sparse.abs().matmul(flat.abs()))));
    Operands dds = operands;
    dds.weight = poisoned(operands.weight);
    multiply(topology, Product::kDds, dds);
    const auto shaped = [&](const torch::Tensor& w) { return laid(w.view({experts, width, k})); };
    EXPECT_TRUE(close(dds.weight, shaped(sparse.t().matmul(dense)),
                      tolerance(dtype, longest, shaped(sparse.abs().t().matmul(dense.abs())))));
  }
}

TEST_P(BlockSparseTest, ProductsAreThoseOfTheMatrixWithItsZeros) {
  for (const auto dtype : all_dtypes()) {
    for (const int64_t block : kBlocks) {
      for (int64_t i = 0; i < effort(2); ++i) {
        const auto counts = random_counts(random_, random_.pick<int64_t>({1, 3, 8}),
                                          random_.pick<int64_t>({5, 200}));
        expect_products(counts, random_.integer(1, 150), random_.integer(1, 150), block, dtype);
        // Multiples of 8, as the tensor cores' own kernel wants them.
        expect_products(counts, 8 * random_.integer(1, 50), 8 * random_.integer(1, 50), block,
                        dtype);
      }
      expect_products({0, 0}, 24, 16, block, dtype);
      expect_products({0, 300, 0}, 264, 136, block, dtype);
      expect_products({128, 64, 0, 256}, 384, 256, block, dtype);
    }
  }
}

// More tiles than a GPU has multiprocessors, in more than one band; long sums.
TEST_P(BlockSparseTest, ManyTilesAndLongSums) {
  expect_products({700, 0, 1500}, 2056, 72, 128, torch::kBFloat16);
  expect_products({700, 0, 1500}, 72, 2056, 128, torch::kHalf);
  expect_products({130, 17}, 136, 4104, 128, torch::kHalf);
  expect_products({130, 17}, 4104, 136, 128, torch::kBFloat16);
}

TEST_P(BlockSparseTest, EmptyProductsWriteNothingOrZeros) {
  expect_products({5, 0, 3}, 16, 0, 128, torch::kFloat32);  // SDD sums nothing
  expect_products({5, 0, 3}, 0, 16, 128, torch::kFloat32);  // DSD sums nothing
}

TEST_P(BlockSparseTest, RefusesOtherBlocks) {
  EXPECT_INPUT_ERROR(build_topology({4, 4}, 16, 48, GetParam()), "48");
  const int64_t many = int64_t{1} << 40;
  EXPECT_INPUT_ERROR(build_topology({many, many}, 1 << 20, 128, GetParam()), "2^31");
}

}  // namespace
}  // namespace anabranch::test
