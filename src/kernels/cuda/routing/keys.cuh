#pragma once

#include "kernels/cuda/device.cuh"

// Whole numbers in the order of floating-point ones.

namespace anabranch::cuda {

/// 0 is NaN's alone, and so below all that is a number.
__device__ inline unsigned key_of(float value) {
  const unsigned bits = __float_as_uint(value + 0.0f);  // −0 is 0
  return isnan(value) ? 0 : bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}
__device__ inline unsigned long long key_of(double value) {
  const auto bits = static_cast<unsigned long long>(__double_as_longlong(value + 0.0));
  return isnan(value) ? 0 : bits ^ (bits >> 63 ? ~0ull : 1ull << 63);
}

__device__ inline float value_of(unsigned key) {
  return __uint_as_float(key ^ (key >> 31 ? 0x80000000u : 0xffffffffu));
}
__device__ inline double value_of(unsigned long long key) {
  return __longlong_as_double(static_cast<int64_t>(key ^ (key >> 63 ? 1ull << 63 : ~0ull)));
}

template <typename value_t>
using key_t = decltype(key_of(value_t{}));

}  // namespace anabranch::cuda
