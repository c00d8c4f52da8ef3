// Where an expert's rows begin. The article's grouped kernel over experts of different sizes took
// e · counts[e] · width, the expert times its own rows, for the address of expert e's first row; it
// is (counts[0] + ... + counts[e − 1]) · width. The two agree for equal counts alone.
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <gtest/gtest.h>

#include <limits>
#include <numeric>

#include "support/devices.h"
#include "support/random.h"
#include "support/tolerance.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

using Counts = std::vector<int64_t>;
using FirstRows = std::vector<int64_t>;

FirstRows expert_times_own_rows(const Counts& counts) {
  FirstRows first;
  for (size_t e = 0; e < counts.size(); ++e) {
    first.push_back(static_cast<int64_t>(e) * counts[e]);
  }
  return first;
}

FirstRows rows_before(const Counts& counts) {
  FirstRows first(counts.size());
  std::exclusive_scan(counts.begin(), counts.end(), first.begin(), int64_t{0});
  return first;
}

// One row more than any expert reaches.
int64_t rows_reached(const Counts& counts, const FirstRows& first) {
  int64_t reached = 0;
  for (size_t e = 0; e < counts.size(); ++e) {
    reached = std::max(reached, first[e] + counts[e]);
  }
  return reached;
}

// A table of addresses, as grouped kernels take them: of each expert's first row.
std::vector<char*> addresses(const torch::Tensor& rows, const FirstRows& first) {
  const auto row_bytes = rows.size(1) * static_cast<int64_t>(rows.element_size());
  std::vector<char*> table;
  for (const int64_t row : first) {
    table.push_back(static_cast<char*>(rows.data_ptr()) + row * row_bytes);
  }
  return table;
}

class RowOffsetsTest : public ::testing::TestWithParam<torch::Device> {
 protected:
  // Whether the product over tables of addresses is y = x · weightᵀ. Rows beyond are NaN.
  ::testing::AssertionResult is_right(const Counts& counts, const FirstRows& first);

  Random random_{test_seed()};
};
INSTANTIATE_TEST_SUITE_P(Devices, RowOffsetsTest, ::testing::ValuesIn(devices()),
                         [](const auto& info) { return device_name(info.param); });

::testing::AssertionResult RowOffsetsTest::is_right(const Counts& counts, const FirstRows& first) {
  constexpr int64_t kIn = 12;
  constexpr int64_t kOut = 20;
  const auto experts = static_cast<int64_t>(counts.size());
  const int64_t rows = std::accumulate(counts.begin(), counts.end(), int64_t{0});
  const int64_t room = std::max(rows, rows_reached(counts, first));
  const auto options = torch::TensorOptions(torch::kFloat64).device(GetParam());
  auto x = torch::full({room, kIn}, std::numeric_limits<double>::quiet_NaN());
  x = x.to(torch::kFloat64);
  x.narrow(0, 0, rows).copy_(random_.normal({rows, kIn}));
  const auto weight = random_.normal({experts, kOut, kIn});
  const auto x_device = x.to(options);
  const auto weight_device = weight.to(options);
  auto y = torch::full({room, kOut}, std::numeric_limits<double>::quiet_NaN(), options);

  const auto sources = addresses(x_device, first);
  const auto targets = addresses(y, first);
  for (int64_t e = 0; e < experts; ++e) {
    const auto source = at::from_blob(sources[e], {counts[e], kIn}, options);
    auto target = at::from_blob(targets[e], {counts[e], kOut}, options);
    at::mm_out(target, source, weight_device[e].t());
  }

  // One token at a time.
  auto exact = torch::zeros({rows, kOut}, torch::kFloat64);
  auto magnitude = torch::zeros({rows, kOut}, torch::kFloat64);
  int64_t row = 0;
  for (int64_t e = 0; e < experts; ++e) {
    for (int64_t i = 0; i < counts[e]; ++i, ++row) {
      exact[row] = (weight[e] * x[row]).sum(1);
      magnitude[row] = (weight[e] * x[row]).abs().sum(1);
    }
  }
  return close(y.narrow(0, 0, rows), exact, tolerance(torch::kFloat64, 2 * kIn, magnitude));
}

TEST_P(RowOffsetsTest, EqualCountsCannotTellTheFormulasApart) {
  for (int64_t i = 0; i < effort(10); ++i) {
    const Counts counts(random_.integer(1, 9), random_.integer(1, 20));
    EXPECT_EQ(expert_times_own_rows(counts), rows_before(counts));
    EXPECT_TRUE(is_right(counts, expert_times_own_rows(counts)));
    EXPECT_TRUE(is_right(counts, rows_before(counts)));
  }
}

TEST_P(RowOffsetsTest, UnequalCountsTellThemApart) {
  for (int64_t i = 0; i < effort(10); ++i) {
    Counts counts;
    for (int64_t e = random_.integer(2, 9); e > 0; --e) {
      counts.push_back(random_.integer(1, 20));
    }
    counts.back() = counts.front() + 1;  // not all are equal
    SCOPED_TRACE(c10::str("counts ", c10::Join(",", counts)));
    EXPECT_FALSE(is_right(counts, expert_times_own_rows(counts)));
    EXPECT_TRUE(is_right(counts, rows_before(counts)));
  }
}

// The article's own split: the wrong table reads and writes beyond the last row.
TEST(RowOffsetsOfTheArticleTest, TheWrongTableLeavesMemory) {
  const Counts counts = {130759, 78925, 35368, 90425, 1433, 120455, 64589, 2134};
  const int64_t rows = std::accumulate(counts.begin(), counts.end(), int64_t{0});
  EXPECT_EQ(rows, 524088);
  EXPECT_EQ(rows_reached(counts, rows_before(counts)), rows);
  EXPECT_EQ(rows_reached(counts, expert_times_own_rows(counts)), 6 * int64_t{120455});
  EXPECT_GT(rows_reached(counts, expert_times_own_rows(counts)), rows);
}

}  // namespace
}  // namespace anabranch::test
