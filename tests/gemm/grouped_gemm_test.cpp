#include <anabranch/grouped_gemm.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <map>
#include <numeric>
#include <set>

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
    cases.push_back({device, "auto"});
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
  auto y = torch::zeros({x.size(0), weight.size(1)}, x.options());
  for_each_expert(counts, [&](int64_t e, int64_t begin, int64_t end) {
    y.slice(0, begin, end) = x.slice(0, begin, end).matmul(weight[e].t());
  });
  return y;
}

torch::Tensor exact_wgrad(const torch::Tensor& dy, const torch::Tensor& x,
                          const std::vector<int64_t>& counts) {
  auto dweight =
      torch::zeros({static_cast<int64_t>(counts.size()), dy.size(1), x.size(1)}, x.options());
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
  // Sizes are rounded up to multiples of 8 for engines that take no others.
  void expect_all_three(const std::vector<int64_t>& counts, int64_t n, int64_t k,
                        torch::Dtype dtype);
  // Of an expert. On a GPU also so many that the largest tiles are taken.
  int64_t most_rows() const { return GetParam().device.is_cuda() ? 1500 : 200; }
  std::vector<torch::Dtype> dtypes() const {
    std::vector<torch::Dtype> supported;
    for (const auto dtype : all_dtypes()) {
      if (engine_->supports(dtype, 8, 8)) supported.push_back(dtype);
    }
    return supported;
  }

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
  if (!engine_->supports(dtype, n, k)) {
    n = (n + 7) / 8 * 8;
    k = (k + 7) / 8 * 8;
  }
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

TEST_P(GroupedGemmTest, AddsTheWeightsGradientToSumsOfFullWidth) {
  for (const auto dtype : dtypes()) {
    const auto sum_type = accumulation_type(dtype);
    const bool gpu = GetParam().device.is_cuda();
    for (int64_t i = 0; i < effort(4); ++i) {
      // On a GPU also more than one launch takes.
      const auto experts = random_.pick<int64_t>({1, 3, 16, gpu ? 300 : 30});
      const auto counts =
          random_counts(random_, experts, random_.pick<int64_t>({1, 70, 300, most_rows()}));
      const int64_t n = 8 * random_.integer(1, gpu ? 40 : 12);
      const int64_t k = 8 * random_.integer(1, gpu ? 20 : 8);
      SCOPED_TRACE(
          c10::str("counts ", c10::Join(",", counts), " n ", n, " k ", k, " ", to_string(dtype)));
      const auto x = random_.normal({sum(counts), k}, dtype).to(torch::kFloat64);
      const auto dy = random_.normal({sum(counts), n}, dtype).to(torch::kFloat64);
      const auto before = random_.normal({experts, n, k}, sum_type).to(torch::kFloat64);
      auto sums = on_device(before, sum_type).clone();
      const auto version = sums._version();
      engine_->wgrad_accumulate(on_device(dy, dtype), on_device(x, dtype), counts, sums);
      EXPECT_GT(sums._version(), version);
      // Not rounded to the rows' type on the way.
      const auto longest = *std::max_element(counts.begin(), counts.end());
      EXPECT_TRUE(close(
          sums, before + exact_wgrad(dy, x, counts),
          tolerance(sum_type, longest + 1, before.abs() + exact_wgrad(dy.abs(), x.abs(), counts))));
    }
  }
}

TEST_P(GroupedGemmTest, EqualsOneProductPerExpert) {
  for (const auto dtype : dtypes()) {
    for (int64_t i = 0; i < effort(12); ++i) {
      const auto experts = random_.pick<int64_t>({1, 2, 3, 7, 16});
      const auto counts =
          random_counts(random_, experts, random_.pick<int64_t>({1, 5, 70, 300, most_rows()}));
      expect_all_three(counts, random_.integer(1, 70), random_.integer(1, 70), dtype);
    }
  }
}

TEST_P(GroupedGemmTest, Corners) {
  for (const auto dtype : dtypes()) {
    expect_all_three({0, 0, 0}, 5, 4, dtype);         // no rows at all
    expect_all_three({}, 5, 4, dtype);                // no experts
    expect_all_three({0, 513, 0, 0}, 33, 65, dtype);  // one expert takes all
    expect_all_three({1, 1, 1, 1, 1}, 1, 1, dtype);
    expect_all_three({7}, 129, 1, dtype);
    expect_all_three(std::vector<int64_t>(64, 2), 16, 16, dtype);
    expect_all_three(std::vector<int64_t>(600, 3), 16, 24, dtype);  // more than one launch holds
  }
}

// On the CPU, where the oracle takes longest, in all types for the engine that cuts alone.
TEST_P(GroupedGemmTest, LargeEnoughToBeCutIntoPieces) {
  auto types = dtypes();
  if (GetParam().device.is_cpu() && GetParam().engine != "cpu") {
    types = {random_.pick(types)};
  }
  for (const auto dtype : types) {
    expect_all_three({1000, 3, 0, 700}, 256, 192, dtype);
    expect_all_three({0, 2100}, 128, 96, dtype);
    expect_all_three({4103, 5, 6540}, 96, 136, dtype);
    expect_all_three({70, 0, 130, 257}, 1000, 328, dtype);
    expect_all_three({129, 5}, 256, 4128, dtype);
    expect_all_three({129, 5}, 4128, 256, dtype);
    if (GetParam().device.is_cuda()) {  // long sums of an odd number of columns
      expect_all_three({129, 5}, 1912, 4104, dtype);
      expect_all_three({129, 5}, 4104, 1912, dtype);
    }
  }
}

TEST_P(GroupedGemmTest, WritesZeroForAnExpertWithoutRows) {
  for (const auto dtype : dtypes()) {
    auto dweight =
        torch::full({3, 16, 8}, 77, torch::TensorOptions(dtype).device(GetParam().device));
    const auto dy = on_device(random_.normal({6, 16}), dtype);
    const auto x = on_device(random_.normal({6, 8}), dtype);
    engine_->wgrad(dy, x, {0, 6, 0}, dweight);
    EXPECT_EQ(max_abs(dweight[0]), 0);
    EXPECT_EQ(max_abs(dweight[2]), 0);
    EXPECT_GT(max_abs(dweight[1]), 0);
  }
}

// ⟨forward(x), dy⟩ = ⟨x, dgrad(dy)⟩ = ⟨weight, wgrad(dy, x)⟩.
TEST_P(GroupedGemmTest, TheThreeAreAdjoint) {
  if (!engine_->supports(torch::kFloat64, 23, 19)) {
    GTEST_SKIP() << engine_->name() << " does not compute in fp64";
  }
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
  for (const auto dtype : dtypes()) {
    const auto x = on_device(random_.normal({631, 72}), dtype);
    const auto dy = on_device(random_.normal({631, 104}), dtype);
    const auto weight = on_device(random_.normal({4, 104, 72}), dtype);
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
  const auto finite = [](const torch::Tensor& tensor) {
    return tensor.isfinite().all().item<bool>();
  };
  for (const auto dtype : dtypes()) {
    auto x = random_.normal({9, 8});
    x.slice(0, 3, 7).fill_(std::numeric_limits<double>::quiet_NaN());
    const auto x_device = on_device(x, dtype);
    const auto weight = on_device(random_.normal({3, 16, 8}), dtype);
    const auto y = grouped_gemm(*engine_, x_device, weight, counts).cpu();
    EXPECT_TRUE(finite(y.slice(0, 0, 3)));
    EXPECT_TRUE(y.slice(0, 3, 7).isnan().all().item<bool>());
    EXPECT_TRUE(finite(y.slice(0, 7, 9)));
    const auto dy = on_device(random_.normal({9, 16}), dtype);
    const auto dweight = grouped_gemm_wgrad(*engine_, dy, x_device, counts).cpu();
    EXPECT_TRUE(finite(dweight[0]));
    EXPECT_TRUE(dweight[1].isnan().all().item<bool>());
    EXPECT_TRUE(finite(dweight[2]));
  }
}

// Where an expert's rows lie among all rows, and beside whom, changes no bit of its result.
TEST_P(GroupedGemmTest, AnExpertsResultDoesNotDependOnItsNeighbours) {
  if (engine_->name() != "hopper" && engine_->name() != "ampere") {
    GTEST_SKIP() << "chooses its sums by the sizes it is given";
  }
  for (const auto dtype : dtypes()) {
    const auto x = on_device(random_.normal({700, 136}), dtype);
    const auto weight = on_device(random_.normal({3, 200, 136}), dtype);
    const auto all = grouped_gemm(*engine_, x, weight, {150, 333, 217});
    const auto own = grouped_gemm(*engine_, x.slice(0, 150, 483), weight.slice(0, 1, 2), {333});
    EXPECT_TRUE(identical(all.slice(0, 150, 483).contiguous(), own));
  }
}

// Rows that are read by an index: the bits of their copies.
TEST_P(GroupedGemmTest, ReadsRowsByTheirIndex) {
  if (GetParam().engine == "auto") {
    GTEST_SKIP() << "may take another engine for copies";
  }
  for (const auto dtype : dtypes()) {
    const auto counts = random_counts(random_, 5, random_.pick<int64_t>({3, 200, most_rows()}));
    const int64_t rows = sum(counts);
    const int64_t n = random_.pick<int64_t>({8, 64, 136, 448});
    const int64_t k = random_.pick<int64_t>({16, 136, 520});
    SCOPED_TRACE(
        c10::str("counts ", c10::Join(",", counts), " n ", n, " k ", k, " ", to_string(dtype)));
    const int64_t all = std::max<int64_t>(1, rows / 3);
    std::vector<int64_t> places(rows);
    for (auto& place : places) place = random_.integer(0, all - 1);
    const auto index = on_device(torch::tensor(places, torch::kInt64), torch::kInt64);
    const ProductRows x = {on_device(random_.normal({all, k}), dtype), index};
    const auto x_copied = x.rows.index_select(0, index);
    const auto weight = on_device(random_.normal({5, n, k}) / std::sqrt(k), dtype);
    const auto options = weight.options();
    const auto poison = std::numeric_limits<double>::quiet_NaN();

    auto y = torch::full({rows, n}, poison, options);
    engine_->forward(x, weight, counts, y);
    EXPECT_TRUE(identical(y, grouped_gemm(*engine_, x_copied, weight, counts)));

    const auto dy = on_device(random_.normal({rows, n}), dtype);
    auto dweight = torch::full({5, n, k}, poison, options);
    engine_->wgrad(dy, x, counts, dweight);
    EXPECT_TRUE(identical(dweight, grouped_gemm_wgrad(*engine_, dy, x_copied, counts)));
    engine_->wgrad(x, dy, counts, dweight = torch::full({5, k, n}, poison, options));
    EXPECT_TRUE(identical(dweight, grouped_gemm_wgrad(*engine_, x_copied, dy, counts)));

    const auto sum_options = options.dtype(accumulation_type(dtype));
    auto sums = torch::ones({5, n, k}, sum_options);
    auto sums_of_copies = sums.clone();
    engine_->wgrad_accumulate(dy, x, counts, sums);
    engine_->wgrad_accumulate(dy, x_copied, counts, sums_of_copies);
    EXPECT_TRUE(identical(sums, sums_of_copies));

    for (const bool glu : {false, true}) {
      const HiddenActivation activation = {Activation::kSilu, glu};
      auto hidden = torch::full({rows, n}, poison, options);
      auto hidden_of_copies = torch::empty_like(hidden);
      const auto activated = engine_->forward_activated(x, weight, counts, activation, hidden);
      EXPECT_TRUE(identical(activated, engine_->forward_activated(x_copied, weight, counts,
                                                                  activation, hidden_of_copies)));
      EXPECT_TRUE(identical(hidden, hidden_of_copies));

      const int64_t width = glu ? 2 * n : n;
      const auto down = on_device(random_.normal({5, k, n}) / std::sqrt(k), dtype);
      const auto values = on_device(random_.normal({rows}), accumulation_type(dtype));
      const auto given = on_device(random_.normal({rows, width}), dtype);
      const auto differentiate = [&](const ProductRows& from) {
        GroupedGemmEngine::ActivatedGradient result = {torch::full({rows, width}, poison, options),
                                                       torch::full({rows}, poison, sum_options),
                                                       torch::full({rows, n}, poison, options)};
        engine_->dgrad_activated(from, down, counts, activation, given, values, result);
        return result;
      };
      const auto gathered = differentiate(x);
      const auto copied = differentiate(x_copied);
      EXPECT_TRUE(identical(gathered.dhidden, copied.dhidden));
      EXPECT_TRUE(identical(gathered.activated, copied.activated));
      EXPECT_TRUE(identical(gathered.drouting_weights, copied.drouting_weights));
    }
  }
}

constexpr Activation kActivations[] = {Activation::kGeluTanh, Activation::kGelu, Activation::kRelu,
                                       Activation::kSilu};

torch::Tensor apply(Activation activation, const torch::Tensor& x) {
  switch (activation) {
    case Activation::kGeluTanh:
      return torch::gelu(x, "tanh");
    case Activation::kGelu:
      return torch::gelu(x);
    case Activation::kRelu:
      return torch::relu(x);
    case Activation::kSilu:
      return torch::silu(x);
    case Activation::kReluSquared:
      return torch::relu(x).square();
    case Activation::kQuickGelu:
      return x * torch::sigmoid(1.702 * x);
  }
  return {};
}

// hidden [P, n or 2n] in fp64 → [P, n].
torch::Tensor exact_activation(const HiddenActivation& activation, const torch::Tensor& hidden) {
  if (!activation.glu) {
    return apply(activation.activation, hidden);
  }
  const auto halves = hidden.chunk(2, 1);
  return apply(activation.activation, halves[0]) * halves[1];
}

TEST_P(GroupedGemmTest, ActivatesWhatItMultiplies) {
  for (const auto dtype : dtypes()) {
    for (const auto activation : kActivations) {
      for (const bool glu : {false, true}) {
        const auto counts = random_counts(random_, 5, random_.pick<int64_t>({3, 200, most_rows()}));
        const int64_t n = random_.pick<int64_t>({8, 64, 136, 192});
        const int64_t k = random_.pick<int64_t>({16, 136, 520});
        const int64_t width = glu ? 2 * n : n;
        SCOPED_TRACE(c10::str("counts ", c10::Join(",", counts), " n ", n, " k ", k, " glu ", glu,
                              " activation ", static_cast<int>(activation), " ", to_string(dtype)));
        const auto x = random_.normal({sum(counts), k}, dtype).to(torch::kFloat64);
        const auto weight = (random_.normal({5, width, k}) / std::sqrt(k)).to(dtype);
        auto hidden = torch::empty({sum(counts), width},
                                   torch::TensorOptions(dtype).device(GetParam().device));
        const auto activated = engine_->forward_activated(
            on_device(x, dtype), on_device(weight, dtype), counts, {activation, glu}, hidden);
        const auto weight64 = weight.to(torch::kFloat64);
        EXPECT_TRUE(close(hidden, exact_forward(x, weight64, counts),
                          tolerance(dtype, k, exact_forward(x.abs(), weight64.abs(), counts))));
        // Of the hidden values as they are stored.
        const auto stored = hidden.cpu().to(torch::kFloat64);
        const auto gate = stored.abs().narrow(1, 0, n);  // no activation is larger
        const auto magnitude = glu ? gate * stored.abs().narrow(1, n, n) : gate;
        EXPECT_TRUE(close(activated, exact_activation({activation, glu}, stored),
                          tolerance(dtype, 16, magnitude + 1e-3, 1)));
      }
    }
  }
}

TEST_P(GroupedGemmTest, DifferentiatesTheActivation) {
  for (const auto dtype : dtypes()) {
    for (const auto activation : kActivations) {
      for (const bool glu : {false, true}) {
        for (const bool weighted : {false, true}) {
          const auto counts =
              random_counts(random_, 5, random_.pick<int64_t>({3, 200, most_rows()}));
          const int64_t rows = sum(counts);
          const int64_t n = random_.pick<int64_t>({8, 64, 136, 192});
          const int64_t h =
              random_.pick<int64_t>({16, 136, 520, GetParam().device.is_cuda() ? 4104 : 520});
          const int64_t width = glu ? 2 * n : n;
          SCOPED_TRACE(c10::str("counts ", c10::Join(",", counts), " n ", n, " h ", h, " glu ", glu,
                                " activation ", static_cast<int>(activation), " ",
                                to_string(dtype)));
          const auto dy = random_.normal({rows, h}, dtype).to(torch::kFloat64);
          const auto weight =
              (random_.normal({5, h, n}) / std::sqrt(h)).to(dtype).to(torch::kFloat64);
          const auto hidden =
              random_.normal({rows, width}, dtype).to(torch::kFloat64).requires_grad_();
          const auto values =
              (weighted ? random_.normal({rows}) : torch::ones({rows}, torch::kFloat64))
                  .to(accumulation_type(dtype))
                  .to(torch::kFloat64)
                  .requires_grad_();
          // The gradient at the activation, and the sum of its terms' magnitudes.
          const auto transposed = weight.transpose(1, 2);
          const auto gradient = exact_forward(dy, transposed, counts);
          const auto magnitude = exact_forward(dy.abs(), transposed.abs(), counts);
          const auto activated = exact_activation({activation, glu}, hidden);
          (values.unsqueeze(1) * activated * gradient).sum().backward();

          const auto device = torch::TensorOptions().device(GetParam().device);
          auto hidden_device = on_device(hidden.detach(), dtype);
          const auto values_device =
              weighted ? on_device(values.detach(), accumulation_type(dtype)) : torch::Tensor();
          const auto run = [&](const torch::Tensor& dhidden) {
            GroupedGemmEngine::ActivatedGradient result = {
                dhidden, torch::empty({rows}, device.dtype(accumulation_type(dtype))),
                torch::empty({rows, n}, device.dtype(dtype))};
            engine_->dgrad_activated(on_device(dy, dtype), on_device(weight, dtype), counts,
                                     {activation, glu}, hidden_device, values_device, result);
            return result;
          };
          const auto result = run(torch::empty_like(hidden_device));
          const auto scale = values.detach().abs().unsqueeze(1);
          const auto up = glu ? hidden.detach().abs().chunk(2, 1)[1] + 1
                              : torch::ones({rows, n}, torch::kFloat64);
          // No slope is larger than 1.2, no activation larger than its argument.
          const auto gate = hidden.detach().abs().narrow(1, 0, n);
          auto dhidden_magnitude = 1.2 * scale * magnitude * up;
          if (glu) {
            dhidden_magnitude = torch::cat({dhidden_magnitude, scale * magnitude * gate}, 1);
          }
          EXPECT_TRUE(close(result.dhidden, hidden.grad(),
                            tolerance(dtype, h + 16, dhidden_magnitude + 1e-3, 3)));
          EXPECT_TRUE(close(result.activated, (values.unsqueeze(1) * activated).detach(),
                            tolerance(dtype, 16, scale * gate * up + 1e-3, 2)));
          EXPECT_TRUE(
              close(result.drouting_weights, values.grad(),
                    tolerance(dtype, h + n + 16, (magnitude * gate * up).sum(1) + 1e-3, 3)));
          // The gradient of hidden in its place.
          EXPECT_TRUE(identical(run(hidden_device).dhidden, result.dhidden));
        }
      }
    }
  }
}

// Sums over so many rows that cuBLAS would split them, and of such a number that it loses some: few of
// the rows are not zero, so that the sums are known exactly.
TEST_P(GroupedGemmTest, LosesNoRowOfALongSum) {
  const auto device = GetParam().device;
  const std::vector<int64_t> counts =
      device.is_cuda() ? std::vector<int64_t>{8193, 8194, 8195, 8321, 0, 8199, 12291, 15107}
                       : std::vector<int64_t>{129, 0, 130, 131, 257};
  const auto experts = static_cast<int64_t>(counts.size());
  const int64_t rows = std::accumulate(counts.begin(), counts.end(), int64_t{0});
  const int64_t n = device.is_cuda() ? random_.pick<int64_t>({512, 1024}) : 16;
  const int64_t k = device.is_cuda() ? 512 : 24;
  for (const auto dtype : dtypes()) {
    SCOPED_TRACE(c10::str(n, " x ", k, " ", to_string(dtype)));
    const auto options = torch::TensorOptions(dtype).device(device);
    const auto dy = torch::zeros({rows, n}, options);
    const auto x = torch::zeros({rows, k}, options);
    const auto expected = torch::zeros({experts, n, k}, options.dtype(torch::kFloat64));
    int64_t begin = 0;
    for (int64_t e = 0; e < experts; begin += counts[e], ++e) {
      if (counts[e] == 0) {
        continue;
      }
      std::set<int64_t> marked = {0, counts[e] - 3, counts[e] - 2, counts[e] - 1};
      for (int64_t row = 128; row < counts[e]; row += 128) {
        marked.insert({row - 1, row});
      }
      for (const int64_t row : marked) {  // one column each: the largest sum is exact in any type
        const int64_t i = random_.integer(0, n - 1);
        const int64_t j = random_.integer(0, k - 1);
        dy[begin + row][i] = 1;
        x[begin + row][j] = 1;
        expected[e][i][j] += 1;
      }
    }
    auto dweight = torch::full({experts, n, k}, 7, options);
    engine_->wgrad(dy, x, counts, dweight);
    EXPECT_TRUE(dweight.to(torch::kFloat64).equal(expected));
  }
}

// The case in which the article met an illegal memory access, 32 sequences of 512 tokens, hidden 512,
// 8 experts, top 4: an expert's network forward and backward, each product against the oracle of
// what went into it. On the CPU, an eighth of hidden and 128 of the tokens.
TEST_P(GroupedGemmTest, TheCaseOfTheIllegalAccess) {
  const auto device = GetParam().device;
  const int64_t tokens = device.is_cuda() ? 32 * 512 : 128;
  const int64_t width = device.is_cuda() ? 512 : 64;
  const int64_t expert_width = 2 * width;
  constexpr int64_t kExperts = 8;
  const auto gate = random_.normal({tokens, kExperts}) + random_.normal({kExperts});
  const auto chosen = std::get<1>(gate.topk(4, 1)).flatten().bincount({}, kExperts);
  const std::vector<int64_t> counts(chosen.data_ptr<int64_t>(),
                                    chosen.data_ptr<int64_t>() + kExperts);
  torch::manual_seed(random_.next());
  // On the device: the CPU would take longer than all that is tested.
  constexpr double kLeastRounding = 0x1p-25;  // of an fp16 number, however small
  const auto within = [](const torch::Tensor& actual, const torch::Tensor& expected,
                         const torch::Tensor& allowed) {
    const auto error = (actual.to(torch::kFloat64) - expected).abs();
    return (error <= allowed + kLeastRounding).all().item<bool>();
  };
  const auto wide = [](const torch::Tensor& tensor) { return tensor.to(torch::kFloat64); };
  for (const auto dtype : dtypes()) {
    SCOPED_TRACE(c10::str("counts ", c10::Join(",", counts), " ", to_string(dtype)));
    const auto options = torch::TensorOptions(dtype).device(device);
    const auto x = torch::randn({4 * tokens, width}, options);
    const auto dy = torch::randn({4 * tokens, width}, options);
    const auto up = torch::randn({kExperts, expert_width, width}, options) / std::sqrt(width);
    const auto down =
        torch::randn({kExperts, width, expert_width}, options) / std::sqrt(expert_width);
    const auto expect_product = [&](const torch::Tensor& actual, const torch::Tensor& rows,
                                    const torch::Tensor& weight) {
      EXPECT_TRUE(within(actual, exact_forward(wide(rows), wide(weight), counts),
                         tolerance(dtype, rows.size(1), 1.0) *
                             exact_forward(wide(rows).abs(), wide(weight).abs(), counts)));
    };
    const auto expect_gradient = [&](const torch::Tensor& actual, const torch::Tensor& above,
                                     const torch::Tensor& rows) {
      EXPECT_TRUE(within(actual, exact_wgrad(wide(above), wide(rows), counts),
                         tolerance(dtype, *std::max_element(counts.begin(), counts.end()), 1.0) *
                             exact_wgrad(wide(above).abs(), wide(rows).abs(), counts)));
    };
    auto hidden = torch::empty({4 * tokens, expert_width}, options);
    const HiddenActivation gelu;
    const auto activated = engine_->forward_activated(x, up, counts, gelu, hidden);
    expect_product(hidden, x, up);
    const auto exact_hidden = wide(hidden).requires_grad_();
    const auto exact_activated = exact_activation(gelu, exact_hidden);
    EXPECT_TRUE(within(activated, exact_activated.detach(),
                       tolerance(dtype, 16, 1.0) * (exact_hidden.detach().abs() + 1e-3)));
    expect_product(grouped_gemm(*engine_, activated, down, counts), activated, down);

    GroupedGemmEngine::ActivatedGradient gradient = {
        torch::empty_like(hidden),
        torch::empty({4 * tokens}, options.dtype(accumulation_type(dtype))),
        torch::empty_like(hidden)};
    engine_->dgrad_activated(dy, down, counts, gelu, hidden, {}, gradient);
    const auto transposed = wide(down).transpose(1, 2);
    exact_activated.backward(exact_forward(wide(dy), transposed, counts));
    const auto magnitude = exact_forward(wide(dy).abs(), transposed.abs(), counts);
    EXPECT_TRUE(within(gradient.dhidden, exact_hidden.grad(),
                       tolerance(dtype, width + 16, 1.0, 3) * (1.2 * magnitude + 1e-3)));
    expect_gradient(grouped_gemm_wgrad(*engine_, dy, gradient.activated, counts), dy,
                    gradient.activated);
    expect_gradient(grouped_gemm_wgrad(*engine_, gradient.dhidden, x, counts), gradient.dhidden, x);
    expect_product(grouped_gemm_dgrad(*engine_, gradient.dhidden, up, counts), gradient.dhidden,
                   up.transpose(1, 2));
  }
}

TEST_P(GroupedGemmTest, RefusesWhatItDoesNotSupport) {
  for (const auto dtype : all_dtypes()) {
    if (engine_->supports(dtype, 4, 3)) continue;
    const auto options = torch::TensorOptions(dtype).device(GetParam().device);
    const auto x = torch::zeros({5, 3}, options);
    const auto dy = torch::zeros({5, 4}, options);
    const auto weight = torch::zeros({2, 4, 3}, options);
    EXPECT_INPUT_ERROR(grouped_gemm(*engine_, x, weight, {2, 3}), engine_->name());
    EXPECT_INPUT_ERROR(grouped_gemm_dgrad(*engine_, dy, weight, {2, 3}), engine_->name());
    EXPECT_INPUT_ERROR(grouped_gemm_wgrad(*engine_, dy, x, {2, 3}), engine_->name());
  }
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
  EXPECT_INPUT_ERROR(engine_->wgrad(dy, x, {2, 3}, narrow), "dweight");
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
  const auto dtype = dtypes().front();
  const auto x = on_device(random_.normal({8, 5}), dtype).t();
  const auto weight = on_device(random_.normal({2, 16, 8}), dtype);
  ASSERT_FALSE(x.is_contiguous());
  const auto thrown = thrown_by([&] {
    EXPECT_TRUE(identical(grouped_gemm(*engine_, x, weight, {2, 3}),
                          grouped_gemm(*engine_, x.contiguous(), weight, {2, 3})));
  });
  EXPECT_TRUE(thrown.kind == Thrown::Kind::kNothing ||
              (thrown.kind == Thrown::Kind::kInput && thrown.says("contiguous")))
      << thrown;
}

// What auto chooses from does not pad; each baseline says how much it does.
TEST(GroupedGemmEnginesTest, PaddingIsCounted) {
  const std::map<std::string, std::vector<int64_t>> expected = {
      {"padded_bmm", {0, 0, 0, 258}},     {"block_diagonal", {0, 0, 64, 766}},
      {"block_sparse", {0, 0, 64, 254}},  {"block_sparse_64", {0, 0, 64, 126}},
      {"block_sparse_32", {0, 0, 0, 62}},
  };
  const std::vector<int64_t> counts[] = {{}, {0, 0}, {96, 96}, {0, 1, 128, 129}};
  for (const auto device : devices()) {
    auto names = grouped_gemm_engines(device);
    names.emplace_back("auto");
    for (const auto& name : names) {
      SCOPED_TRACE(name);
      const auto engine = make_grouped_gemm_engine(device, name);
      const auto known = expected.find(name);
      for (size_t i = 0; i < std::size(counts); ++i) {
        EXPECT_EQ(engine->padding_rows(counts[i]), known == expected.end() ? 0 : known->second[i]);
      }
    }
  }
}

// Its explanation names all that it measured.
TEST(GroupedGemmEnginesTest, AutoDoesNotConsiderBaselines) {
  for (const auto device : devices()) {
    const auto engine = make_grouped_gemm_engine(device);
    const auto options = torch::TensorOptions(torch::kBFloat16).device(device);
    const auto x = torch::ones({24, 64}, options);
    const auto weight = torch::ones({2, 32, 64}, options);
    EXPECT_EQ(grouped_gemm(*engine, x, weight, {8, 16}).min().item<double>(), 64);
    const auto considered = engine->explain();
    EXPECT_NE(considered.find(device.is_cuda() ? "cublas_grouped" : "cpu"), std::string::npos);
    for (const char* baseline : {"padded_bmm", "block_diagonal", "block_sparse", "torch"}) {
      EXPECT_EQ(considered.find(baseline), std::string::npos) << considered;
    }
  }
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
