#include "gemm/auto/rule.h"

namespace anabranch {
namespace {

bool is_skewed_wgrad(const Product& product) {
  return product.kind.starts_with("wgrad") && product.skew > 0;
}

/// A weight's gradient with an expert that has most of very many rows: our kernel has 0.72 of a dense
/// product's rate, for its last tiles are the longest sums; two streams of cuBLAS, which cuts them, 0.95.
bool has_a_long_expert(const Product& product) {
  constexpr int64_t kLong = 1 << 14;  // rows of the mean expert; at 2048 ours is as fast
  return is_skewed_wgrad(product) && product.rows >= kLong * product.experts;
}

/// cuBLAS takes the host 4 to 10 us an expert in a loop: what takes the GPU less goes in one call, unless
/// that call is slower still.
bool is_bound_by_the_host(const Product& product) {
  constexpr double kSoonDone = 1e9;  // FLOP of the mean expert
  const double flop = 2.0 * static_cast<double>(product.rows) * static_cast<double>(product.n) *
                      static_cast<double>(product.k);
  return !is_skewed_wgrad(product) && flop < kSoonDone * static_cast<double>(product.experts);
}

}  // namespace

std::vector<std::string> engines_by_rule(const Product& product) {
  if (has_a_long_expert(product)) {
    return {"cublas_loop_2", "hopper"};
  }
  if (is_bound_by_the_host(product)) {
    return {"hopper", "cublas_grouped", "cublas_loop_4"};
  }
  return {"hopper", "cublas_loop_4"};
}

}  // namespace anabranch
