// Where CUDA's device code branches and the suites' small sizes do not reach: wide rows, many
// experts, rows that begin anywhere in memory, more elements than 32 bits count. The CPU's kernels,
// which the suites hold against naive loops, are the reference: exactly for integers, in fp64 for
// the rest.
#include <ATen/cuda/CUDAContextLight.h>
#include <c10/cuda/CUDACachingAllocator.h>

#include "kernels/kernels_fixture.h"
#include "support/random_routing.h"

namespace anabranch::test {
namespace {

// exp and erf are good to a few units in the last place of their argument's size.
constexpr int64_t kTranscendental = 32;

class CudaKernelsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!have_cuda()) {
      GTEST_SKIP() << "no GPU on this machine";
    }
  }

  /// On the GPU; sometimes from an address that only the element's own size divides.
  torch::Tensor on_gpu(const torch::Tensor& tensor) {
    const auto options = tensor.options().device(torch::kCUDA);
    if (random_.chance(0.7)) {
      return tensor.to(options);
    }
    auto shifted = torch::empty({tensor.numel() + 1}, options).narrow(0, 1, tensor.numel());
    return shifted.view(tensor.sizes()).copy_(tensor);
  }

  std::vector<int64_t> random_counts(int64_t experts, int64_t largest) {
    std::vector<int64_t> counts;
    for (int64_t e = 0; e < experts; ++e) {
      counts.push_back(random_.chance(0.3) ? 0 : random_.integer(1, largest));
    }
    return counts;
  }

  /// Logits of which some are equal, and some tokens are not finite.
  torch::Tensor random_logits(int64_t tokens, int64_t experts, torch::Dtype dtype) {
    auto logits = 3 * random_.normal({tokens, experts});
    if (random_.chance()) {
      logits = logits.round();
    }
    for (int64_t bad = random_.integer(0, 2); bad > 0 && tokens > 0; --bad) {
      const auto value = random_.pick<double>({NAN, INFINITY, -INFINITY});
      logits[random_.integer(0, tokens - 1)][random_.integer(0, experts - 1)] = value;
    }
    return logits.to(dtype);
  }

  Random random_{test_seed()};
  const ActivationKernels& cpu_activation_ = ActivationKernels::cpu();
  const ActivationKernels& cuda_activation_ = ActivationKernels::cuda();
  const BiasKernels& cpu_bias_ = BiasKernels::cpu();
  const BiasKernels& cuda_bias_ = BiasKernels::cuda();
  const GateKernels& cpu_gate_ = GateKernels::cpu();
  const GateKernels& cuda_gate_ = GateKernels::cuda();
  const PlanKernels& cpu_plan_ = PlanKernels::cpu();
  const PlanKernels& cuda_plan_ = PlanKernels::cuda();
  const RoutingKernels& cpu_routing_ = RoutingKernels::cpu();
  const RoutingKernels& cuda_routing_ = RoutingKernels::cuda();
  const RowKernels& cpu_rows_ = RowKernels::cpu();
  const RowKernels& cuda_rows_ = RowKernels::cuda();
};

torch::Tensor rows_of(const std::vector<int64_t>& counts, const torch::Tensor& per_expert) {
  return per_expert.repeat_interleave(torch::tensor(counts, torch::kInt64), 0);
}

int64_t sum(const std::vector<int64_t>& counts) {
  return std::accumulate(counts.begin(), counts.end(), int64_t{0});
}

TEST_F(CudaKernelsTest, RouteEqualsTheCpu) {
  for (const int64_t experts :
       {1, 2, 7, 8, 9, 32, 33, 64, 100, 128, 256, 384, 512, 1024, 1100, 5000}) {
    for (const auto dtype : {torch::kFloat32, torch::kFloat64}) {
      const auto top_k = random_.integer(1, std::min<int64_t>(experts, 40));
      const auto tokens = random_.pick<int64_t>({0, 1, 77, 9000});
      RoutingRule rule;
      rule.top_k = top_k;
      rule.renormalize = random_.chance();
      SCOPED_TRACE(c10::str("T ", tokens, " E ", experts, " k ", top_k, " ", to_string(dtype)));
      const auto logits = random_logits(tokens, experts, dtype);
      const auto expected = cpu_routing_.route(logits, rule, {});
      const auto exact = cpu_routing_.route(logits.to(torch::kFloat64), rule, {});
      const auto result = cuda_routing_.route(on_gpu(logits), rule, {});
      EXPECT_TRUE(identical(result.expert_ids.cpu(), expected.expert_ids));
      EXPECT_TRUE(identical(result.counts.cpu(), expected.counts));
      EXPECT_TRUE(identical(result.first_nonfinite_token.cpu(), expected.first_nonfinite_token));
      const auto finite = expected.logsumexp.isfinite().nonzero().flatten();
      const auto compare = [&](const torch::Tensor& actual, const torch::Tensor& wanted) {
        const auto value = wanted.index_select(0, finite);
        EXPECT_TRUE(close(actual.cpu().index_select(0, finite), value,
                          tolerance(dtype, experts + kTranscendental, value.abs())));
      };
      compare(result.weights, exact.weights);
      compare(result.probabilities, exact.probabilities);
      EXPECT_TRUE(close(
          result.logsumexp.cpu().index_select(0, finite), exact.logsumexp.index_select(0, finite),
          tolerance(dtype, experts + kTranscendental, 1 + max_abs(logits.nan_to_num(0, 0, 0)))));
    }
  }
}

TEST_F(CudaKernelsTest, RoutingSumsAreOfAllTokens) {
  for (const int64_t experts : {1, 2, 7, 8, 64, 100, 128, 255, 256, 257, 300, 1024, 1100}) {
    for (const auto dtype : {torch::kFloat32, torch::kFloat64}) {
      const auto tokens = random_.pick<int64_t>({0, 1, 5, 77, 3000, 9001});
      SCOPED_TRACE(c10::str("T ", tokens, " E ", experts, " ", to_string(dtype)));
      const auto probabilities = random_.uniform({tokens, experts}).to(dtype);
      const auto logsumexp = random_.normal({tokens}, dtype);
      const auto result = cuda_routing_.routing_sums(on_gpu(probabilities), on_gpu(logsumexp));
      const auto expected = probabilities.to(torch::kFloat64).sum(0);
      EXPECT_TRUE(close(result.probabilities, expected, tolerance(dtype, tokens, expected)));
      const auto squares = logsumexp.to(torch::kFloat64).square().sum();
      EXPECT_TRUE(close(result.squared_logsumexp, squares, tolerance(dtype, tokens, squares)));
      const auto again = cuda_routing_.routing_sums(on_gpu(probabilities), on_gpu(logsumexp));
      EXPECT_TRUE(identical(result.probabilities, again.probabilities));
      EXPECT_TRUE(identical(result.squared_logsumexp, again.squared_logsumexp));
    }
  }
}

TEST_F(CudaKernelsTest, SequencesAreSummedAndCountedApart) {
  for (const int64_t experts : {1, 3, 8, 64, 128, 257, 1100}) {
    for (const auto dtype : {torch::kFloat32, torch::kFloat64}) {
      const bool many = experts == 8;  // more than the second dimension of a grid takes
      const auto sequences = many ? 70000 : random_.pick<int64_t>({1, 2, 7, 300});
      const auto length = many ? 3 : random_.pick<int64_t>({0, 1, 33, 500});
      const auto top_k = random_.integer(1, 9);
      SCOPED_TRACE(
          c10::str("S ", sequences, " of ", length, " E ", experts, " ", to_string(dtype)));
      const auto probabilities = random_.uniform({sequences * length, experts}).to(dtype);
      const auto logsumexp = random_.normal({sequences * length}, dtype);
      const auto result =
          cuda_routing_.routing_sums(on_gpu(probabilities), on_gpu(logsumexp), sequences);
      const auto exact = probabilities.to(torch::kFloat64).view({sequences, length, experts});
      EXPECT_TRUE(close(result.of_sequences, exact.sum(1), tolerance(dtype, length, exact.sum(1))));
      EXPECT_TRUE(close(result.probabilities, exact.sum(0).sum(0),
                        tolerance(dtype, sequences * length, exact.sum(0).sum(0))));
      // Ids on both sides of an expert's.
      const auto ids = torch::randint(-1, experts + 1, {sequences * length, top_k}, torch::kInt64);
      const auto counts = cuda_routing_.sequence_counts(on_gpu(ids), sequences, experts, dtype);
      const auto places = ids.view({sequences, length * top_k}) + 1 +
                          (experts + 2) * torch::arange(sequences).unsqueeze(1);
      const auto expected = places.flatten()
                                .bincount({}, sequences * (experts + 2))
                                .view({sequences, experts + 2})
                                .narrow(1, 1, experts);
      EXPECT_TRUE(identical(counts, expected.to(dtype)));
    }
  }
}

TEST_F(CudaKernelsTest, RouteBackwardEqualsTheCpu) {
  for (const int64_t experts : {1, 3, 8, 20, 64, 128, 500, 1024, 2000}) {
    for (const auto dtype : {torch::kFloat32, torch::kFloat64}) {
      const auto top_k = random_.integer(1, std::min<int64_t>(experts, 40));
      RoutingRule rule;
      rule.top_k = top_k;
      rule.renormalize = random_.chance();
      const auto routed = cpu_routing_.route(
          3 * random_.normal({random_.integer(0, 500), experts}, dtype), rule, {});
      const auto dweights = random_.normal(routed.weights.sizes(), dtype);
      const auto dsum = random_.normal({experts}, dtype);
      const auto dsquared = random_.normal({}, dtype);
      auto as64 = routed;
      as64.weights = routed.weights.to(torch::kFloat64);
      as64.probabilities = routed.probabilities.to(torch::kFloat64);
      as64.logsumexp = routed.logsumexp.to(torch::kFloat64);
      const auto exact =
          cpu_routing_.route_backward(as64, rule, dweights.to(torch::kFloat64),
                                      dsum.to(torch::kFloat64), dsquared.to(torch::kFloat64));
      const RouteResult on_device{on_gpu(routed.expert_ids),
                                  on_gpu(routed.weights),
                                  on_gpu(routed.probabilities),
                                  on_gpu(routed.logsumexp),
                                  on_gpu(routed.counts),
                                  on_gpu(routed.first_nonfinite_token),
                                  {}};
      const auto result = cuda_routing_.route_backward(on_device, rule, on_gpu(dweights),
                                                       on_gpu(dsum), on_gpu(dsquared));
      // dp = dw / s: where the chosen probabilities are small, gradients are large.
      const double smallest = std::max(
          routed.weights.numel() == 0
              ? 1.0
              : routed.probabilities.gather(1, routed.expert_ids).sum(1).min().item<double>(),
          1e-30);
      const double size =
          max_abs(dsum) +
          static_cast<double>(top_k) * 2 * max_abs(dweights) / (rule.renormalize ? smallest : 1) +
          2 * max_abs(routed.logsumexp) * max_abs(dsquared);
      EXPECT_TRUE(close(result, exact, tolerance(dtype, experts + top_k, 2 * size)))
          << "E " << experts << " k " << top_k << " " << to_string(dtype);
    }
  }
}

TEST_F(CudaKernelsTest, PlansEqualTheCpus) {
  for (int64_t i = 0; i < effort(24); ++i) {
    const auto experts = random_.pick<int64_t>({8, 64, 128, 256, 1024, 1025, 3000});
    const auto top_k = random_.integer(1, 8);
    const auto tokens = random_.pick<int64_t>({1, 100, 2049, 40000});
    const auto ranks = random_.pick<int64_t>({1, 2, 8, 64});
    std::vector<int64_t> first;
    for (int64_t r = 0; r <= ranks; ++r) {
      first.push_back(r * experts / ranks);
    }
    SCOPED_TRACE(c10::str("T ", tokens, " E ", experts, " k ", top_k, " W ", ranks));
    auto ids = random_expert_ids(random_, tokens, experts, top_k, random_.pick(all_skews()));
    const bool may_skip = random_.chance();
    if (may_skip) {
      ids = ids.masked_fill(random_.uniform(ids.sizes()) < 0.3, -1);
    }
    const auto expected = cpu_plan_.plan_send(ids, first, may_skip);
    const auto result = cuda_plan_.plan_send(on_gpu(ids), first, may_skip);
    const auto sent = expected.send_tokens.size(0);
    EXPECT_TRUE(identical(result.expert_counts.cpu(), expected.expert_counts));
    EXPECT_TRUE(identical(result.rank_rows.cpu(), expected.rank_rows));
    EXPECT_TRUE(identical(result.send_tokens.narrow(0, 0, sent).cpu(), expected.send_tokens));
    EXPECT_TRUE(identical(result.token_offsets.cpu(), expected.token_offsets));
    EXPECT_TRUE(identical(result.token_rows.narrow(0, 0, sent).cpu(), expected.token_rows));
    EXPECT_TRUE(identical(result.send_order.cpu(), expected.send_order));
    const auto kept = ids.ge(0).sum().item<int64_t>();
    EXPECT_TRUE(identical(result.segment_rows.narrow(0, 0, kept).cpu(),
                          expected.segment_rows.narrow(0, 0, kept)));
  }
}

TEST_F(CudaKernelsTest, InvalidIdsReachNoForeignMemory) {
  auto ids = random_expert_ids(random_, 500, 16, 4, Skew::kUniform);
  ids[3][1] = std::numeric_limits<int64_t>::max();
  ids[400][0] = -7;
  ids[77][2] = ids[77][1];
  for (const auto& first : {std::vector<int64_t>{0, 16}, std::vector<int64_t>{0, 4, 4, 16}}) {
    const auto plan = cuda_plan_.plan_send(on_gpu(ids), first);
    EXPECT_EQ(plan.expert_counts.sum().item<int64_t>(), 2000);  // and compute-sanitizer is content
  }
}

TEST_F(CudaKernelsTest, GroupTakesAnyNumberOfGroups) {
  for (const int64_t groups : {1, 1023, 1024, 1025, 70000, 3000000}) {
    for (const int64_t size : {1, 2047, 2048, 2049, 300000}) {
      const auto keys =
          (random_.uniform({size}) * static_cast<double>(groups)).floor().to(torch::kInt64);
      const auto expected = cpu_plan_.group(keys, groups);
      const auto result = cuda_plan_.group(on_gpu(keys), groups);
      EXPECT_TRUE(identical(result.offsets.cpu(), expected.offsets)) << groups << " " << size;
      EXPECT_TRUE(identical(result.members.cpu(), expected.members)) << groups << " " << size;
    }
  }
}

TEST_F(CudaKernelsTest, WideRows) {
  for (const auto dtype : all_dtypes()) {
    for (const int64_t width : {512, 1000, 1023, 1024, 2050, 4096, 7168, 7176}) {
      SCOPED_TRACE(c10::str(to_string(dtype), " width ", width));
      const auto tokens = random_.integer(1, 60);
      const auto rows = random_.normal({tokens, width}, dtype);
      const auto index =
          (random_.uniform({200}) * static_cast<double>(tokens)).floor().to(torch::kInt64);
      const auto groups = cpu_plan_.group(index, tokens);
      const Csr on_device{on_gpu(groups.offsets), on_gpu(groups.members)};
      const auto gathered = rows.index_select(0, index);
      const auto weights = random_.normal({200}, accumulation_type(dtype));
      EXPECT_TRUE(identical(cuda_rows_.gather_rows(on_gpu(rows), on_gpu(index)).cpu(), gathered));
      const auto gathered64 = gathered.to(torch::kFloat64);
      const auto weights64 = weights.to(torch::kFloat64);
      EXPECT_TRUE(close(
          cuda_rows_.sum_rows(on_gpu(gathered), on_device, on_gpu(weights)),
          cpu_rows_.sum_rows(gathered64, groups, weights64),
          tolerance(dtype, 200, cpu_rows_.sum_rows(gathered64.abs(), groups, weights64.abs()))));
    }
  }
}

TEST_F(CudaKernelsTest, WideActivations) {
  for (const auto dtype : all_dtypes()) {
    for (const int64_t n : {256, 257, 768, 1024, 1536, 2048, 2056, 14336}) {
      const auto activation = static_cast<Activation>(random_.integer(0, 3));
      const bool glu = random_.chance();
      const auto rows = random_.integer(1, 40);
      SCOPED_TRACE(c10::str(to_string(dtype), " n ", n, " activation ",
                            static_cast<int>(activation), " glu ", glu, " rows ", rows));
      const auto hidden = (2 * random_.normal({rows, glu ? 2 * n : n})).to(dtype);
      const auto dactivated = random_.normal({rows, n}, dtype);
      const auto weights = random_.normal({rows}, accumulation_type(dtype));
      const auto hidden64 = hidden.to(torch::kFloat64);
      const double size = (1 + max_abs(hidden)) * (1 + max_abs(hidden));
      EXPECT_TRUE(close(cuda_activation_.activate(on_gpu(hidden), {activation, glu}),
                        cpu_activation_.activate(hidden64, {activation, glu}),
                        tolerance(dtype, kTranscendental, size)));
      const auto exact = activate_backward(cpu_activation_, dactivated.to(torch::kFloat64),
                                           hidden64, weights.to(torch::kFloat64), activation, glu);
      const auto result = activate_backward(cuda_activation_, on_gpu(dactivated), on_gpu(hidden),
                                            on_gpu(weights), activation, glu);
      const double scale = size * max_abs(weights);
      EXPECT_TRUE(close(result.weighted, exact.weighted, tolerance(dtype, kTranscendental, scale)));
      EXPECT_TRUE(close(result.dhidden, exact.dhidden,
                        tolerance(dtype, kTranscendental, scale * max_abs(dactivated))));
      EXPECT_TRUE(close(result.dweights, exact.dweights,
                        tolerance(accumulation_type(dtype), n + kTranscendental,
                                  static_cast<double>(n) * size * max_abs(dactivated))));
    }
  }
}

TEST_F(CudaKernelsTest, WideBiases) {
  for (const auto dtype : all_dtypes()) {
    for (const int64_t width : {256, 1000, 1023, 4096, 7168}) {
      const auto counts = random_counts(random_.pick<int64_t>({1, 9, 130}), 700 / 9);
      SCOPED_TRACE(c10::str(to_string(dtype), " width ", width, " rows ", sum(counts)));
      const auto rows = random_.normal({sum(counts), width}, dtype);
      const auto bias = random_.normal({static_cast<int64_t>(counts.size()), width}, dtype);
      const auto weights = random_.normal({sum(counts)}, accumulation_type(dtype));
      const auto rows64 = rows.to(torch::kFloat64);
      const auto bias64 = bias.to(torch::kFloat64);
      const auto weights64 = weights.to(torch::kFloat64);
      auto biased = on_gpu(rows);
      cuda_bias_.add_bias(biased, on_gpu(bias), counts);
      const auto own = rows_of(counts, bias64);
      EXPECT_TRUE(close(biased, rows64 + own, tolerance(dtype, 1, rows64.abs() + own.abs())));
      EXPECT_TRUE(close(cuda_bias_.bias_dot(on_gpu(rows), on_gpu(bias), counts),
                        (rows64 * own).sum(1),
                        tolerance(accumulation_type(dtype), width, (rows64 * own).abs().sum(1))));
      EXPECT_TRUE(close(
          cuda_bias_.bias_gradient(on_gpu(rows), on_gpu(weights), counts),
          cpu_bias_.bias_gradient(rows64, weights64, counts),
          tolerance(dtype, 80, cpu_bias_.bias_gradient(rows64.abs(), weights64.abs(), counts))));
    }
  }
}

TEST_F(CudaKernelsTest, BiasGradientOfManyRows) {
  const std::vector<int64_t> counts = {0, 20000, 1, 512, 513, 0};
  const auto rows = random_.normal({sum(counts), 72}, torch::kBFloat16);
  const auto rows64 = rows.to(torch::kFloat64);
  EXPECT_TRUE(
      close(cuda_bias_.bias_gradient(on_gpu(rows), {}, counts),
            cpu_bias_.bias_gradient(rows64, {}, counts),
            tolerance(torch::kBFloat16, 20000, cpu_bias_.bias_gradient(rows64.abs(), {}, counts))));
}

TEST_F(CudaKernelsTest, TwoRunsAgreeBitForBit) {
  const auto logits = on_gpu(random_.normal({3000, 64}, torch::kFloat32));
  RoutingRule rule;
  rule.top_k = 6;
  const auto routed = cuda_routing_.route(logits, rule, {});
  const auto plan = cuda_plan_.plan_send(routed.expert_ids, {0, 20, 41, 64});
  const auto sent = plan.rank_rows.sum().item<int64_t>();
  const auto token_rows = plan.token_rows.narrow(0, 0, sent);
  const auto hidden = on_gpu(random_.normal({3000, 2 * 1536}, torch::kBFloat16));
  const auto dactivated = on_gpu(random_.normal({3000, 1536}, torch::kBFloat16));
  const auto weights = on_gpu(random_.normal({3000}, torch::kFloat32));
  const std::vector<int64_t> counts = {1000, 0, 1700, 300};
  const auto gradient = [&] {
    return activate_backward(cuda_activation_, dactivated, hidden, weights, Activation::kSilu,
                             true);
  };
  const auto first = gradient();
  const auto bias = cuda_bias_.bias_gradient(hidden, weights, counts);
  for (int i = 0; i < 5; ++i) {
    const auto again = cuda_routing_.route(logits, rule, {});
    EXPECT_TRUE(identical(again.weights, routed.weights));
    EXPECT_TRUE(identical(again.counts, routed.counts));
    const auto again_plan = cuda_plan_.plan_send(routed.expert_ids, {0, 20, 41, 64});
    EXPECT_TRUE(identical(again_plan.send_order, plan.send_order));
    EXPECT_TRUE(identical(again_plan.token_rows.narrow(0, 0, sent), token_rows));
    const auto second = gradient();
    EXPECT_TRUE(identical(second.dweights, first.dweights));
    EXPECT_TRUE(identical(second.dhidden, first.dhidden));
    EXPECT_TRUE(identical(second.weighted, first.weighted));
    EXPECT_TRUE(identical(cuda_bias_.bias_gradient(hidden, weights, counts), bias));
  }
}

TEST_F(CudaKernelsTest, MoreElementsThan32BitsCount) {
  constexpr int64_t kWidth = 4096;
  constexpr int64_t kRows = (int64_t{1} << 31) / kWidth + 3000;
  size_t free = 0;
  size_t total = 0;
  c10::cuda::CUDACachingAllocator::emptyCache();
  ASSERT_EQ(cudaMemGetInfo(&free, &total), cudaSuccess);
  if (free < size_t{32} << 30) {
    GTEST_SKIP() << "needs 32 GiB of free GPU memory";
  }
  at::globalContext().setDeterministicFillUninitializedMemory(false);
  const auto rows =
      torch::randn({kRows, kWidth}, torch::TensorOptions(torch::kBFloat16).device(torch::kCUDA));
  const auto index =
      torch::arange(kRows - 1, -1, -1, torch::TensorOptions(torch::kInt64).device(torch::kCUDA));
  const auto gathered = cuda_rows_.gather_rows(rows, index);
  EXPECT_TRUE(identical(gathered.narrow(0, 0, 5), rows.narrow(0, kRows - 5, 5).flip({0})));
  EXPECT_TRUE(identical(gathered.narrow(0, kRows - 5, 5), rows.narrow(0, 0, 5).flip({0})));
  const auto groups = cuda_plan_.group(index, kRows);
  EXPECT_TRUE(cuda_rows_.sum_rows(gathered, groups, {}).equal(rows));
  const auto activated = cuda_activation_.activate(rows, {Activation::kSilu, false});
  EXPECT_TRUE(identical(
      activated.narrow(0, kRows - 9, 9),
      cuda_activation_.activate(rows.narrow(0, kRows - 9, 9), {Activation::kSilu, false})));
  const std::vector<int64_t> counts = {kRows - 7, 7};
  const auto bias = cuda_bias_.bias_gradient(rows, {}, counts);
  EXPECT_TRUE(identical(bias.narrow(0, 1, 1),
                        cuda_bias_.bias_gradient(rows.narrow(0, kRows - 7, 7), {}, {7})));
  at::globalContext().setDeterministicFillUninitializedMemory(true);
}

}  // namespace
}  // namespace anabranch::test
