// What auto takes where it measures nothing: the shapes of benchmarks/results/gpu_grouped_gemm.json.
#include "gemm/auto/rule.h"

#include <gtest/gtest.h>

#include <cmath>

namespace anabranch::test {
namespace {

using Counts = std::vector<int64_t>;
using Names = std::vector<std::string>;

// Rows of each expert: alike, or as many in proportion to 1 / place^0.8.
Counts spread(int64_t rows, int64_t experts, bool zipf) {
  double total = 0;
  std::vector<double> shares;
  for (int64_t e = 0; e < experts; ++e) {
    shares.push_back(zipf ? std::pow(e + 1.0, -0.8) : 1.0);
    total += shares.back();
  }
  Counts counts;
  for (const double share : shares) {
    counts.push_back(std::llround(share / total * static_cast<double>(rows)));
  }
  return counts;
}

Names rule(const char* operation, int64_t k, int64_t n, const Counts& counts) {
  return engines_by_rule(product_of(operation, torch::kBFloat16, n, k, counts));
}

// 0.72 to 1.03 of one dense product's rate on an H200, wherever it is.
TEST(EngineRuleTest, OurKernelComesFirst) {
  struct Shape {
    int64_t k, n, experts, rows;
  };
  for (const auto& [k, n, experts, rows] : {Shape{4096, 28672, 8, 16384},
                                            {2048, 1536, 128, 262144},
                                            {7168, 4096, 4, 16384},
                                            {1536, 512, 128, 196608},
                                            {1024, 1024, 64, 8192}}) {
    for (const bool zipf : {false, true}) {
      for (const char* operation : {"forward", "dgrad", "wgrad", "dgrad with GLU"}) {
        EXPECT_EQ(rule(operation, k, n, spread(rows, experts, zipf)).front(), "hopper");
      }
    }
  }
}

// The article's split: there our kernel has 0.72, cuBLAS on two streams 0.95.
TEST(EngineRuleTest, AWeightsGradientWithALongExpert) {
  const Counts article = {130759, 78925, 35368, 90425, 1433, 120455, 64589, 2134};
  EXPECT_EQ(rule("wgrad", 512, 2048, article), (Names{"cublas_loop_2", "hopper"}));
  EXPECT_EQ(rule("wgrad, accumulated", 512, 2048, article), (Names{"cublas_loop_2", "hopper"}));
  EXPECT_EQ(rule("forward", 512, 2048, article).front(), "hopper");
  EXPECT_EQ(rule("wgrad", 512, 2048, spread(524088, 8, false)).front(), "hopper");
}

// Without our kernel: many small experts in one call (0.36 against 0.08), others in a loop (0.49 to 1.03
// against 0.34 to 0.42), and skewed gradients of weights always (0.07 against 0.03).
TEST(EngineRuleTest, OfCublasTheLoopUnlessTheHostIsSlower) {
  const auto second = [](const Names& names) { return names.at(1); };
  for (const char* operation : {"forward", "dgrad", "wgrad"}) {
    EXPECT_EQ(second(rule(operation, 1024, 1024, spread(8192, 64, false))), "cublas_grouped");
    EXPECT_EQ(second(rule(operation, 1536, 512, spread(196608, 128, false))), "cublas_loop_4");
    EXPECT_EQ(second(rule(operation, 4096, 28672, spread(16384, 8, true))), "cublas_loop_4");
  }
  EXPECT_EQ(second(rule("forward", 1024, 1024, spread(8192, 64, true))), "cublas_grouped");
  EXPECT_EQ(second(rule("wgrad", 1024, 1024, spread(8192, 64, true))), "cublas_loop_4");
}

// Nothing but the shape counts: no clock, no file.
TEST(EngineRuleTest, OfNoRows) {
  EXPECT_FALSE(rule("forward", 64, 32, {0, 0}).empty());
  EXPECT_FALSE(rule("wgrad", 64, 32, {}).empty());
}

}  // namespace
}  // namespace anabranch::test
