#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <torch/types.h>

#include <cstdint>
#include <random>
#include <vector>

namespace anabranch::test {

/// Reproducible random numbers and tensors: the same on every rank for the same seed. Tensors lie on
/// the CPU.
class Random {
 public:
  explicit Random(uint64_t seed)
      : engine_(seed), generator_(at::detail::createCPUGenerator(engine_())) {}

  uint64_t next() { return engine_(); }
  /// In [low, high].
  int64_t integer(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(engine_);
  }
  double uniform() { return std::uniform_real_distribution<double>(0, 1)(engine_); }
  bool chance(double probability = 0.5) { return uniform() < probability; }
  template <typename T>
  T pick(const std::vector<T>& values) {
    return values[static_cast<size_t>(integer(0, static_cast<int64_t>(values.size()) - 1))];
  }

  /// Standard normal fp64, rounded to `dtype`.
  torch::Tensor normal(torch::IntArrayRef sizes, torch::Dtype dtype = torch::kFloat64) {
    return at::randn(sizes, generator_, torch::kFloat64).to(dtype);
  }
  /// Uniform fp64 in [0, 1), rounded to `dtype`.
  torch::Tensor uniform(torch::IntArrayRef sizes, torch::Dtype dtype = torch::kFloat64) {
    return at::rand(sizes, generator_, torch::kFloat64).to(dtype);
  }
  torch::Tensor permutation(int64_t size) { return at::randperm(size, generator_, torch::kInt64); }

 private:
  std::mt19937_64 engine_;
  at::Generator generator_;
};

}  // namespace anabranch::test
