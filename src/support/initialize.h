#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <torch/types.h>

#include <cmath>
#include <cstdint>

namespace anabranch {

/// Fills `parameter` [out, in] or [out] with U(−1/√fan_in, 1/√fan_in). The values depend on
/// (seed, stream) alone: not on the device, the type or what was drawn before. On the meta device
/// there is nothing to fill.
inline void fill_uniform(torch::Tensor parameter, int64_t fan_in, uint64_t seed, uint64_t stream) {
  if (parameter.is_meta()) {
    return;
  }
  const torch::NoGradGuard no_grad;
  // SplitMix64's finaliser spreads neighbouring seeds and streams over all 64 bits.
  uint64_t mixed = seed * 0x9E3779B97F4A7C15ull + stream + 1;
  mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9ull;
  mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EBull;
  auto generator = at::detail::createCPUGenerator(mixed ^ (mixed >> 31));
  const double bound = 1.0 / std::sqrt(static_cast<double>(fan_in));
  parameter.copy_(at::empty(parameter.sizes(), torch::kFloat64).uniform_(-bound, bound, generator));
}

}  // namespace anabranch
