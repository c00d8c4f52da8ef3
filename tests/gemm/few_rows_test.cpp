// The product of few rows in bf16, with each kind of vectors that this processor has.
#include "gemm/cpu/few_rows.h"

#include <gtest/gtest.h>

#include "support/random.h"
#include "support/tolerance.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

TEST(FewRowsTest, EqualsTheProductWithVectorsOfEachWidth) {
  Random random{test_seed()};
  for (const int lanes : vector_widths()) {
    for (int64_t i = 0; i < effort(40); ++i) {
      const int64_t m = random.integer(0, 9), n = random.integer(0, 70);
      const int64_t k = random.pick<int64_t>({0, 1, 31, 32, 33, random.integer(2, 300)});
      SCOPED_TRACE(c10::str(lanes, " floats, m ", m, " n ", n, " k ", k));
      // Within larger matrices, whose rows are further apart than they are long.
      const auto x =
          random.normal({m, k + 3}, torch::kBFloat16).to(torch::kBFloat16).narrow(1, 1, k);
      const auto weight =
          random.normal({n, k + 5}, torch::kBFloat16).to(torch::kBFloat16).narrow(1, 2, k);
      auto whole = torch::full({m, n + 2}, 77, torch::kBFloat16);
      auto y = whole.narrow(1, 0, n);
      multiply_few_rows(x, weight, y, lanes);
      const auto exact_x = x.to(torch::kFloat64), exact = weight.to(torch::kFloat64).t();
      EXPECT_TRUE(close(y, exact_x.mm(exact),
                        tolerance(torch::kBFloat16, k, exact_x.abs().mm(exact.abs()))));
      EXPECT_TRUE((whole.narrow(1, n, 2) == 77).all().item<bool>());
    }
  }
}

TEST(FewRowsTest, ARowsResultIsThatRowsAlone) {
  Random random{test_seed()};
  const auto x = random.normal({7, 75}, torch::kBFloat16).to(torch::kBFloat16);
  const auto weight = random.normal({37, 75}, torch::kBFloat16).to(torch::kBFloat16);
  auto all = torch::empty({7, 37}, torch::kBFloat16);
  multiply_few_rows(x, weight, all);
  for (int64_t row = 0; row < 7; ++row) {
    auto alone = torch::empty({1, 37}, torch::kBFloat16);
    multiply_few_rows(x.slice(0, row, row + 1), weight, alone);
    EXPECT_TRUE(identical(alone, all.slice(0, row, row + 1)));
  }
}

}  // namespace
}  // namespace anabranch::test
