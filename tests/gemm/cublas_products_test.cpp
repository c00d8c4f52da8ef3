// The addresses that the cuBLAS engines hand out: see row_offsets_test.cpp.
#include "gemm/cublas/cublas_products.h"

#include <gtest/gtest.h>

#include <numeric>

#include "support/random.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

// Of each expert with rows, in the order of the experts.
TEST(CublasProductsTest, EachExpertBeginsAtItsOwnFirstRow) {
  Random random(test_seed());
  for (int64_t i = 0; i < effort(20); ++i) {
    std::vector<int64_t> counts;
    for (int64_t e = random.integer(1, 9); e > 0; --e) {
      counts.push_back(random.chance(0.3) ? 0 : random.integer(1, 20));
    }
    SCOPED_TRACE(c10::str("counts ", c10::Join(",", counts)));
    const auto rows = std::accumulate(counts.begin(), counts.end(), int64_t{0});
    const auto experts = static_cast<int64_t>(counts.size());
    const auto x = torch::zeros({rows, 5});
    const auto weight = torch::zeros({experts, 7, 5});
    auto y = torch::zeros({rows, 7});
    auto dx = torch::zeros({rows, 5});
    const auto forward = forward_products(x, weight, counts, y, nullptr).products;
    const auto dgrad = dgrad_products(y, weight, counts, dx, nullptr).products;
    size_t product = 0;
    int64_t row = 0;
    for (int64_t e = 0; e < experts; row += counts[e], ++e) {
      if (counts[e] == 0) continue;
      ASSERT_LT(product, forward.size());
      ASSERT_LT(product, dgrad.size());
      EXPECT_EQ(forward[product].n, counts[e]);
      EXPECT_EQ(forward[product].a, weight[e].data_ptr());
      EXPECT_EQ(forward[product].b, x[row].data_ptr());
      EXPECT_EQ(forward[product].c, y[row].data_ptr());
      EXPECT_EQ(dgrad[product].b, y[row].data_ptr());
      EXPECT_EQ(dgrad[product].c, dx[row].data_ptr());
      ++product;
    }
    EXPECT_EQ(product, forward.size());
    EXPECT_EQ(product, dgrad.size());
  }
}

}  // namespace
}  // namespace anabranch::test
