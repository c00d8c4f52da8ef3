#include <anabranch/grouped_gemm.h>
#include <gtest/gtest.h>

#include <limits>
#include <numeric>

#include "support/devices.h"
#include "support/random.h"
#include "support/thrown.h"
#include "support/tolerance.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

struct EngineCase {
  torch::Device device;
  std::string engine;
};

std::vector<EngineCase> engine_cases() {
  std::vector<EngineCase> cases;
  for (const auto device : devices()) {
    for (const auto& name : grouped_gemm_engines(device)) {
      cases.push_back({device, name});
    }
  }
  return cases;
}

// Rows per expert, expert-major.
std::vector<int64_t> random_counts(Random& random, int64_t experts, int64_t largest) {
  std::vector<int64_t> counts;
  for (int64_t e = 0; e < experts; ++e) {
    counts.push_back(random.chance(0.3) ? 0 : random.integer(1, largest));
  }
  return counts;
}

int64_t sum(const std::vector<int64_t>& counts) {
  return std::accumulate(counts.begin(), counts.end(), int64_t{0});
}

// per_expert(e, first row, last row) for every expert with rows.
template <typename PerExpert>
void for_each_expert(const std::vector<int64_t>& counts, const PerExpert& per_expert) {
  int64_t row = 0;
  for (size_t e = 0; e < counts.size(); ++e) {
    per_expert(static_cast<int64_t>(e), row, row + counts[e]);
    row += counts[e];
  }
}

// fp64, one expert at a time.
torch::Tensor exact_forward(const torch::Tensor& x, const torch::Tensor& weight,
                            const std::vector<int64_t>& counts) {
  auto y = torch::zeros({x.size(0), weight.size(1)}, torch::kFloat64);
  for_each_expert(counts, [&](int64_t e, int64_t begin, int64_t end) {
    y.slice(0, begin, end) = x.slice(0, begin, end).matmul(weight[e].t());
  });
  return y;
}

torch::Tensor exact_wgrad(const torch::Tensor& dy, const torch::Tensor& x,
                          const std::vector<int64_t>& counts) {
  auto dweight =
      torch::zeros({static_cast<int64_t>(counts.size()), dy.size(1), x.size(1)}, torch::kFloat64);
  for_each_expert(counts, [&](int64_t e, int64_t begin, int64_t end) {
    dweight[e] = dy.slice(0, begin, end).t().matmul(x.slice(0, begin, end));
  });
  return dweight;
}

class GroupedGemmTest : public ::testing::TestWithParam<EngineCase> {
 protected:
  torch::Tensor on_device(const torch::Tensor& tensor, torch::Dtype dtype) {
    return tensor.to(GetParam().device, dtype);
  }
  void expect_all_three(const std::vector<int64_t>& counts, int64_t n, int64_t k,
                        torch::Dtype dtype);

  std::shared_ptr<GroupedGemmEngine> engine_ =
      make_grouped_gemm_engine(GetParam().device, GetParam().engine);
  Random random_{test_seed()};
};
INSTANTIATE_TEST_SUITE_P(Engines, GroupedGemmTest, ::testing::ValuesIn(engine_cases()),
                         [](const auto& info) {
                           return device_name(info.param.device) + "_" + info.param.engine;
                         });

void GroupedGemmTest::expect_all_three(const std::vector<int64_t>& counts, int64_t n, int64_t k,
                                       torch::Dtype dtype) {
  const auto rows = sum(counts);
  const auto experts = static_cast<int64_t>(counts.size());
  SCOPED_TRACE(
      c10::str("counts ", c10::Join(",", counts), " n ", n, " k ", k, " ", to_string(dtype)));
  const auto x = random_.normal({rows, k}, dtype).to(torch::kFloat64);
  const auto dy = random_.normal({rows, n}, dtype).to(torch::kFloat64);
  const auto weight = random_.normal({experts, n, k}, dtype).to(torch::kFloat64);
  const auto x_device = on_device(x, dtype);
  const auto dy_device = on_device(dy, dtype);
  const auto weight_device = on_device(weight, dtype);

  const auto y = grouped_gemm(*engine_, x_device, weight_device, counts);
  EXPECT_EQ(y.scalar_type(), dtype);
  EXPECT_TRUE(close(y, exact_forward(x, weight, counts),
                    tolerance(dtype, k, exact_forward(x.abs(), weight.abs(), counts))));
  const auto transposed = weight.transpose(1, 2);
  EXPECT_TRUE(close(grouped_gemm_dgrad(*engine_, dy_device, weight_device, counts),
                    exact_forward(dy, transposed, counts),
                    tolerance(dtype, n, exact_forward(dy.abs(), transposed.abs(), counts))));
  const auto longest = counts.empty() ? 0 : *std::max_element(counts.begin(), counts.end());
  EXPECT_TRUE(close(grouped_gemm_wgrad(*engine_, dy_device, x_device, counts),
                    exact_wgrad(dy, x, counts),
                    tolerance(dtype, longest, exact_wgrad(dy.abs(), x.abs(), counts))));
}

TEST_P(GroupedGemmTest, EqualsOneProductPerExpert) {
  for (const auto dtype : all_dtypes()) {
    for (int64_t i = 0; i < effort(12); ++i) {
      const auto experts = random_.pick<int64_t>({1, 2, 3, 7, 16});
      const auto counts = random_counts(random_, experts, random_.pick<int64_t>({1, 5, 70, 300}));
      expect_all_three(counts, random_.integer(1, 70), random_.integer(1, 70), dtype);
    }
  }
}

TEST_P(GroupedGemmTest, Corners) {
  for (const auto dtype : all_dtypes()) {
    expect_all_three({0, 0, 0}, 5, 4, dtype);         // no rows at all
    expect_all_three({}, 5, 4, dtype);                // no experts
    expect_all_three({0, 513, 0, 0}, 33, 65, dtype);  // one expert takes all
    expect_all_three({1, 1, 1, 1, 1}, 1, 1, dtype);
    expect_all_three({7}, 129, 1, dtype);
    expect_all_three(std::vector<int64_t>(64, 2), 16, 16, dtype);
  }
}

TEST_P(GroupedGemmTest, LargeEnoughToBeCutIntoPieces) {
  expect_all_three({1000, 3, 0, 700}, 256, 192, torch::kFloat32);
  expect_all_three({0, 2100}, 128, 96, torch::kBFloat16);
}

TEST_P(GroupedGemmTest, WritesZeroForAnExpertWithoutRows) {
  for (const auto dtype : all_dtypes()) {
    auto dweight =
        torch::full({3, 4, 5}, 77, torch::TensorOptions(dtype).device(GetParam().device));
    const auto dy = on_device(random_.normal({6, 4}), dtype);
    const auto x = on_device(random_.normal({6, 5}), dtype);
    engine_->wgrad(dy, x, {0, 6, 0}, dweight);
    EXPECT_EQ(max_abs(dweight[0]), 0);
    EXPECT_EQ(max_abs(dweight[2]), 0);
    EXPECT_GT(max_abs(dweight[1]), 0);
  }
}

// ⟨forward(x), dy⟩ = ⟨x, dgrad(dy)⟩ = ⟨weight, wgrad(dy, x)⟩.
TEST_P(GroupedGemmTest, TheThreeAreAdjoint) {
  const std::vector<int64_t> counts = {5, 0, 31, 2};
  const auto x = on_device(random_.normal({38, 19}), torch::kFloat64);
  const auto dy = on_device(random_.normal({38, 23}), torch::kFloat64);
  const auto weight = on_device(random_.normal({4, 23, 19}), torch::kFloat64);
  const auto dot = [](const torch::Tensor& a, const torch::Tensor& b) {
    return (a * b).sum().item<double>();
  };
  const auto forward = dot(grouped_gemm(*engine_, x, weight, counts), dy);
  const auto magnitude = dot(grouped_gemm(*engine_, x.abs(), weight.abs(), counts), dy.abs());
  const auto allowed = 2 * tolerance(torch::kFloat64, 38 * 23 + 19, magnitude);
  EXPECT_NEAR(dot(grouped_gemm_dgrad(*engine_, dy, weight, counts), x), forward, allowed);
  EXPECT_NEAR(dot(grouped_gemm_wgrad(*engine_, dy, x, counts), weight), forward, allowed);
}

TEST_P(GroupedGemmTest, TwoRunsAgreeBitForBit) {
  const std::vector<int64_t> counts = {400, 0, 31, 200};
  for (const auto dtype : all_dtypes()) {
    const auto x = on_device(random_.normal({631, 70}), dtype);
    const auto dy = on_device(random_.normal({631, 90}), dtype);
    const auto weight = on_device(random_.normal({4, 90, 70}), dtype);
    EXPECT_TRUE(identical(grouped_gemm(*engine_, x, weight, counts),
                          grouped_gemm(*engine_, x, weight, counts)));
    EXPECT_TRUE(identical(grouped_gemm_dgrad(*engine_, dy, weight, counts),
                          grouped_gemm_dgrad(*engine_, dy, weight, counts)));
    EXPECT_TRUE(identical(grouped_gemm_wgrad(*engine_, dy, x, counts),
                          grouped_gemm_wgrad(*engine_, dy, x, counts)));
  }
}

// An expert's rows decide its result, not its neighbours': NaN stays where it is.
TEST_P(GroupedGemmTest, ExpertsDoNotLeakIntoEachOther) {
  const std::vector<int64_t> counts = {3, 4, 2};
  auto x = random_.normal({9, 6});
  x.slice(0, 3, 7).fill_(std::numeric_limits<double>::quiet_NaN());
  const auto weight = random_.normal({3, 5, 6});
  const auto y = grouped_gemm(*engine_, on_device(x, torch::kFloat32),
                              on_device(weight, torch::kFloat32), counts)
                     .cpu();
  EXPECT_TRUE(y.slice(0, 0, 3).isfinite().all().item<bool>());
  EXPECT_TRUE(y.slice(0, 3, 7).isnan().all().item<bool>());
  EXPECT_TRUE(y.slice(0, 7, 9).isfinite().all().item<bool>());
}

TEST_P(GroupedGemmTest, RefusesWhatDoesNotFit) {
  const auto device = torch::TensorOptions().device(GetParam().device);
  const auto x = torch::zeros({5, 3}, device);
  const auto weight = torch::zeros({2, 4, 3}, device);
  const auto dy = torch::zeros({5, 4}, device);
  EXPECT_INPUT_ERROR(grouped_gemm(*engine_, x, weight, {2, 2}), "5");
  EXPECT_INPUT_ERROR(grouped_gemm(*engine_, x, weight, {5}), "2");
  EXPECT_INPUT_ERROR(grouped_gemm(*engine_, x, weight, {6, -1}), "-1");
  EXPECT_INPUT_ERROR(grouped_gemm(*engine_, x.to(torch::kFloat64), weight, {2, 3}), "Double");
  EXPECT_INPUT_ERROR(grouped_gemm(*engine_, x, torch::zeros({2, 4, 2}, device), {2, 3}), "3");
  EXPECT_INPUT_ERROR(grouped_gemm(*engine_, x[0], weight, {2, 3}), "[3]");
  EXPECT_INPUT_ERROR(grouped_gemm(*engine_, torch::Tensor(), weight, {2, 3}), "x");
  EXPECT_INPUT_ERROR(grouped_gemm_dgrad(*engine_, x, weight, {2, 3}), "4");
  EXPECT_INPUT_ERROR(grouped_gemm_dgrad(*engine_, dy, weight, {2, 2}), "5");
  EXPECT_INPUT_ERROR(grouped_gemm_wgrad(*engine_, dy.slice(0, 0, 4), x, {2, 3}), "4");
  EXPECT_INPUT_ERROR(grouped_gemm_wgrad(*engine_, dy, x, {2, 2}), "5");
  auto narrow = torch::empty({2, dy.size(1), x.size(1) - 1}, x.options());
  EXPECT_INPUT_ERROR(grouped_gemm_wgrad_out(*engine_, dy, x, {2, 3}, narrow), "dweight");
  EXPECT_INPUT_ERROR(grouped_gemm_wgrad(*engine_, dy.to(torch::kMeta), x, {2, 3}), "meta");
}

// Counts whose sum wraps around to the number of rows are refused, not added up.
TEST_P(GroupedGemmTest, RefusesCountsThatOverflow) {
  const auto device = torch::TensorOptions().device(GetParam().device);
  constexpr auto kMax = std::numeric_limits<int64_t>::max();
  const auto x = torch::zeros({5, 3}, device);
  const auto weight = torch::zeros({3, 4, 3}, device);
  const auto thrown = thrown_by([&] { grouped_gemm(*engine_, x, weight, {kMax, kMax, 7}); });
  EXPECT_EQ(thrown.kind, Thrown::Kind::kInput) << thrown;
}

TEST_P(GroupedGemmTest, HandlesOrRefusesStridedOperands) {
  const auto x = on_device(random_.normal({3, 5}), torch::kFloat32).t();
  const auto weight = on_device(random_.normal({2, 4, 3}), torch::kFloat32);
  ASSERT_FALSE(x.is_contiguous());
  const auto thrown = thrown_by([&] {
    EXPECT_TRUE(identical(grouped_gemm(*engine_, x, weight, {2, 3}),
                          grouped_gemm(*engine_, x.contiguous(), weight, {2, 3})));
  });
  EXPECT_TRUE(thrown.kind == Thrown::Kind::kNothing ||
              (thrown.kind == Thrown::Kind::kInput && thrown.says("contiguous")))
      << thrown;
}

TEST(GroupedGemmEnginesTest, UnknownNamesAreRefusedWithTheKnownOnes) {
  const auto thrown = thrown_by([] { make_grouped_gemm_engine(torch::kCPU, "abacus"); });
  EXPECT_EQ(thrown.kind, Thrown::Kind::kInput) << thrown;
  EXPECT_TRUE(thrown.says("abacus")) << thrown;
  for (const auto& name : grouped_gemm_engines(torch::kCPU)) {
    EXPECT_TRUE(thrown.says(name)) << thrown;
    EXPECT_EQ(make_grouped_gemm_engine(torch::kCPU, name)->name(), name);
  }
  EXPECT_INPUT_ERROR(make_grouped_gemm_engine(torch::kMeta), "meta");
}

}  // namespace
}  // namespace anabranch::test
