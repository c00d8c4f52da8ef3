#include "kernels/kernels_fixture.h"
#include "reference/dense_moe.h"

namespace anabranch::test {
namespace {

class FeedForwardKernelsTest : public KernelsTest {};
ANABRANCH_FOR_EACH_DEVICE(FeedForwardKernelsTest);

const std::vector<Activation> kActivations = {Activation::kGeluTanh, Activation::kGelu,
                                              Activation::kRelu, Activation::kSilu};

// exp, tanh and erf are good to a few units in the last place, and GELU takes 1 + tanh, which
// cancels: terms of absolute size |x|.
constexpr int64_t kTranscendental = 32;

torch::Tensor activated(const torch::Tensor& hidden, Activation activation, bool glu) {
  if (!glu) {
    return reference::activation(hidden, activation);
  }
  const auto n = hidden.size(1) / 2;
  return reference::activation(hidden.slice(1, 0, n), activation) * hidden.slice(1, n, 2 * n);
}

TEST_P(FeedForwardKernelsTest, ActivateEqualsReference) {
  for (const auto dtype : all_dtypes()) {
    for (const auto activation : kActivations) {
      for (const bool glu : {false, true}) {
        const auto rows = random_.pick<int64_t>({0, 1, 5, 300});
        const auto n = random_.pick<int64_t>({1, 7, 16, 65});
        SCOPED_TRACE(c10::str(to_string(dtype), " activation ", static_cast<int>(activation),
                              " glu ", glu, " rows ", rows, " n ", n));
        const auto hidden = (3 * random_.normal({rows, glu ? 2 * n : n})).to(dtype);
        const auto exact = hidden.to(torch::kFloat64);
        auto magnitude = exact.slice(1, 0, n).abs() + 1;
        magnitude = glu ? magnitude * exact.slice(1, n, 2 * n).abs() : magnitude;
        const auto result = activation_.activate(on_device(hidden), {activation, glu});
        EXPECT_EQ(result.scalar_type(), dtype);
        EXPECT_TRUE(close(result, activated(exact, activation, glu),
                          tolerance(dtype, kTranscendental, magnitude)));
      }
    }
  }
}

TEST_P(FeedForwardKernelsTest, ActivateSurvivesLargeValues) {
  const auto hidden = torch::tensor({{-1e4F, 1e4F, -90.0F, 90.0F, 0.0F}});
  for (const auto activation : kActivations) {
    const auto result = activation_.activate(on_device(hidden), {activation, false}).cpu();
    const auto expected = torch::tensor({{0.0F, 1e4F, 0.0F, 90.0F, 0.0F}});
    EXPECT_TRUE(close(result, expected, 1e-4)) << static_cast<int>(activation);
    const auto gradient = activate_backward(activation_, on_device(torch::ones({1, 5})),
                                            on_device(hidden), {}, activation, false);
    EXPECT_TRUE(
        close(gradient.dhidden.slice(1, 0, 4), torch::tensor({{0.0F, 1.0F, 0.0F, 1.0F}}), 1e-4))
        << static_cast<int>(activation);
  }
}

TEST_P(FeedForwardKernelsTest, ActivateBackwardEqualsAutograd) {
  for (const auto dtype : all_dtypes()) {
    for (const auto activation : kActivations) {
      for (const bool glu : {false, true}) {
        for (const bool weighted : {false, true}) {
          const auto rows = random_.pick<int64_t>({0, 1, 5, 300});
          const auto n = random_.pick<int64_t>({1, 7, 16, 65});
          SCOPED_TRACE(c10::str(to_string(dtype), " activation ", static_cast<int>(activation),
                                " glu ", glu, " weighted ", weighted, " rows ", rows, " n ", n));
          const auto hidden = random_.normal({rows, glu ? 2 * n : n}, dtype);
          const auto dactivated = random_.normal({rows, n}, dtype);
          const auto weights = random_.normal({rows}, accumulation_type(dtype));

          const auto hidden64 = hidden.to(torch::kFloat64).requires_grad_();
          const auto weights64 =
              (weighted ? weights.to(torch::kFloat64) : torch::ones({rows}, torch::kFloat64))
                  .requires_grad_();
          const auto weighted64 = activated(hidden64, activation, glu) * weights64.unsqueeze(1);
          const auto dactivated64 = dactivated.to(torch::kFloat64);
          (weighted64 * dactivated64).sum().backward();

          const auto result =
              activate_backward(activation_, on_device(dactivated), on_device(hidden),
                                weighted ? on_device(weights) : torch::Tensor(), activation, glu);
          const double size = (1 + max_abs(hidden)) * (1 + max_abs(hidden));
          EXPECT_EQ(result.dhidden.scalar_type(), dtype);
          EXPECT_EQ(result.weighted.scalar_type(), dtype);
          EXPECT_EQ(result.dweights.scalar_type(), accumulation_type(dtype));
          EXPECT_TRUE(close(result.weighted, weighted64,
                            tolerance(dtype, kTranscendental, size * max_abs(weights64))));
          EXPECT_TRUE(close(
              result.dhidden, hidden64.grad(),
              tolerance(dtype, kTranscendental, size * max_abs(weights64) * max_abs(dactivated))));
          // A sum of n products, none of them rounded to the storage type.
          EXPECT_TRUE(close(result.dweights, weights64.grad(),
                            tolerance(accumulation_type(dtype), n + kTranscendental,
                                      static_cast<double>(n) * size * max_abs(dactivated))));
        }
      }
    }
  }
}

/// With limits and offset; of values at a limit the gradient is that below it.
torch::Tensor limited(const torch::Tensor& hidden, const HiddenActivation& of) {
  const auto n = of.glu ? hidden.size(1) / 2 : hidden.size(1);
  const auto most = [&](const torch::Tensor& x) {
    return of.limit > 0 ? torch::where(x > of.limit, torch::full_like(x, of.limit), x) : x;
  };
  const auto gate = reference::activation(most(hidden.slice(1, 0, n)), of.activation);
  return of.glu ? gate * (-most(-most(hidden.slice(1, n, 2 * n))) + of.offset) : gate;
}

TEST_P(FeedForwardKernelsTest, LimitsAndOffsetsAndTheirGradients) {
  for (const auto dtype : all_dtypes()) {
    for (const auto activation :
         {Activation::kSilu, Activation::kRelu, Activation::kReluSquared, Activation::kQuickGelu}) {
      for (const bool glu : {false, true}) {
        HiddenActivation of{activation, glu};
        of.limit = random_.pick<double>({0, 0.5, 1.5});
        of.offset = glu ? random_.pick<double>({0, 1}) : 0;
        const auto rows = random_.pick<int64_t>({0, 1, 5, 300});
        const auto n = random_.pick<int64_t>({1, 7, 16, 65});
        SCOPED_TRACE(c10::str(to_string(dtype), " activation ", static_cast<int>(activation),
                              " glu ", glu, " limit ", of.limit, " offset ", of.offset, " rows ",
                              rows, " n ", n));
        const auto hidden = random_.normal({rows, glu ? 2 * n : n}, dtype);
        auto dactivated = random_.normal({rows, n}, dtype);
        const auto weights = random_.normal({rows}, accumulation_type(dtype));
        const auto hidden64 = hidden.to(torch::kFloat64).requires_grad_();
        const auto weights64 = weights.to(torch::kFloat64).requires_grad_();
        const auto exact = limited(hidden64, of);
        (exact * weights64.unsqueeze(1) * dactivated.to(torch::kFloat64)).sum().backward();

        const double bound = 2 + max_abs(hidden);
        const double size = bound * bound * bound;
        EXPECT_TRUE(close(activation_.activate(on_device(hidden), of), exact,
                          tolerance(dtype, kTranscendental, size)));
        auto weighted = on_device(dactivated).clone();
        const ActivationGradient gradient{torch::empty_like(on_device(hidden)),
                                          torch::empty_like(on_device(weights))};
        activation_.activate_backward(weighted, on_device(hidden), on_device(weights), of,
                                      gradient);
        const double of_weight = 1 + max_abs(weights64);
        EXPECT_TRUE(close(weighted, exact * weights64.unsqueeze(1),
                          tolerance(dtype, kTranscendental, size * of_weight)));
        EXPECT_TRUE(close(
            gradient.dhidden, hidden64.grad(),
            tolerance(dtype, kTranscendental, 2 * size * of_weight * (1 + max_abs(dactivated)))));
        EXPECT_TRUE(close(gradient.dweights, weights64.grad(),
                          tolerance(accumulation_type(dtype), n + kTranscendental,
                                    static_cast<double>(n) * size * max_abs(dactivated))));
      }
    }
  }
}

TEST_P(FeedForwardKernelsTest, AddBiasAddsItsExpertsRow) {
  for (const auto dtype : all_dtypes()) {
    const auto counts = random_counts(6, 40);
    const auto width = random_.pick<int64_t>({1, 7, 64});
    const auto rows = random_.normal({sum(counts), width}, dtype);
    const auto bias = random_.normal({6, width}, dtype);
    auto result = on_device(rows).clone();
    bias_.add_bias(result, on_device(bias), counts);
    const auto own = bias.to(torch::kFloat64).index_select(0, expert_of_rows(counts));
    const auto exact = rows.to(torch::kFloat64) + own;
    EXPECT_TRUE(
        close(result, exact, tolerance(dtype, 1, rows.to(torch::kFloat64).abs() + own.abs())));
  }
}

TEST_P(FeedForwardKernelsTest, BiasGradientSumsAnExpertsRows) {
  for (const auto dtype : all_dtypes()) {
    for (const bool weighted : {false, true}) {
      for (const int64_t largest : {0, 3, 400}) {
        const auto counts = largest == 0 ? std::vector<int64_t>(5, 0) : random_counts(5, largest);
        const auto width = random_.pick<int64_t>({1, 7, 64});
        const auto rows = random_.normal({sum(counts), width}, dtype);
        const auto weights = random_.normal({sum(counts)}, accumulation_type(dtype));
        auto terms = rows.to(torch::kFloat64);
        terms = weighted ? terms * weights.to(torch::kFloat64).unsqueeze(1) : terms;
        const auto zero = torch::zeros({5, width}, torch::kFloat64);
        const auto result = bias_.bias_gradient(
            on_device(rows), weighted ? on_device(weights) : torch::Tensor(), counts);
        EXPECT_EQ(result.scalar_type(), dtype);
        EXPECT_TRUE(close(
            result, zero.index_add(0, expert_of_rows(counts), terms),
            tolerance(dtype, largest + 1, zero.index_add(0, expert_of_rows(counts), terms.abs()))))
            << to_string(dtype) << " weighted " << weighted << " counts " << counts;
      }
    }
  }
}

TEST_P(FeedForwardKernelsTest, BiasDotIsTheProductWithItsExpertsRow) {
  for (const auto dtype : all_dtypes()) {
    const auto counts = random_counts(6, 40);
    const auto width = random_.pick<int64_t>({1, 7, 64, 129});
    const auto rows = random_.normal({sum(counts), width}, dtype);
    const auto bias = random_.normal({6, width}, dtype);
    const auto terms =
        rows.to(torch::kFloat64) * bias.to(torch::kFloat64).index_select(0, expert_of_rows(counts));
    const auto result = bias_.bias_dot(on_device(rows), on_device(bias), counts);
    EXPECT_EQ(result.scalar_type(), accumulation_type(dtype));
    EXPECT_TRUE(close(result, terms.sum(1),
                      tolerance(accumulation_type(dtype), width, terms.abs().sum(1))));
  }
}

}  // namespace
}  // namespace anabranch::test
