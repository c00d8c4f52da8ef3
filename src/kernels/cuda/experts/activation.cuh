#pragma once

#include "kernels/cuda/device.cuh"

// The activations and their derivatives, element by element.

namespace anabranch::cuda {

__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ double error_function(double x) { return erf(x); }
__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ float error_function(float x) { return erff(x); }

// One instruction each: to a few units in the last place, what is subnormal becomes zero.
__device__ __forceinline__ float fast_exponential(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * 1.4426950408889634f));
  return result;
}
__device__ __forceinline__ float fast_reciprocal(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

/// 1 / (1 + e^−x). `kFast`: to a few units in the last place of fp32, which 16-bit types round away.
template <bool kFast, typename acc_t>
__device__ __forceinline__ acc_t sigmoid(acc_t x) {
  if constexpr (kFast) {
    return fast_reciprocal(1.0f + fast_exponential(-x));
  } else {
    return acc_t{1} / (acc_t{1} + exponential(-x));
  }
}

/// erfc(z) e^(z²) for z ≥ 0: erfc to 1.5e-7 (Abramowitz & Stegun 7.1.26).
__device__ __forceinline__ float tail_over_density(float z) {
  const float t = fast_reciprocal(1.0f + 0.3275911f * z);
  float sum = 1.061405429f;
  sum = sum * t - 1.453152027f;
  sum = sum * t + 1.421413741f;
  sum = sum * t - 0.284496736f;
  sum = sum * t + 0.254829592f;
  return sum * t;
}

/// An activation and its derivative at x.
template <typename acc_t>
struct Activated {
  acc_t value;
  acc_t slope;
};

template <ActivationKind kKind, bool kFast, typename acc_t>
__device__ __forceinline__ Activated<acc_t> activate_at(acc_t x) {
  if constexpr (kKind == ActivationKind::kGeluTanh) {
    // ½ (1 + tanh u) = sigmoid(2u), u = √(2/π) (x + 0.044715 x³)
    constexpr acc_t kTwiceRoot = static_cast<acc_t>(1.5957691216057307117597842);
    constexpr acc_t kCubic = static_cast<acc_t>(0.044715);
    const acc_t square = x * x;
    const acc_t s = sigmoid<kFast>(kTwiceRoot * x * (1 + kCubic * square));
    return {x * s, s + x * s * (1 - s) * kTwiceRoot * (1 + 3 * kCubic * square)};
  } else if constexpr (kKind == ActivationKind::kGelu) {
    constexpr acc_t kRootHalf = static_cast<acc_t>(0.70710678118654752440084436);
    constexpr acc_t kDensity = static_cast<acc_t>(0.39894228040143267793994606);  // 1 / √(2π)
    if constexpr (kFast) {
      const float density = fast_exponential(-0.5f * x * x);
      const float tail = 0.5f * tail_over_density(fabsf(x) * kRootHalf) * density;
      const float cdf = x < 0 ? tail : 1.0f - tail;
      return {x * cdf, cdf + x * kDensity * density};
    } else {
      const acc_t cdf = acc_t{0.5} * (1 + error_function(x * kRootHalf));
      return {x * cdf, cdf + x * kDensity * exponential(acc_t{-0.5} * x * x)};
    }
  } else if constexpr (kKind == ActivationKind::kRelu) {
    return {x <= 0 ? acc_t{0} : x, x <= 0 ? acc_t{0} : acc_t{1}};  // NaN stays NaN
  } else if constexpr (kKind == ActivationKind::kReluSquared) {
    return {x <= 0 ? acc_t{0} : x * x, x <= 0 ? acc_t{0} : 2 * x};
  } else if constexpr (kKind == ActivationKind::kQuickGelu) {
    constexpr acc_t kAlpha = static_cast<acc_t>(1.702);
    const acc_t s = sigmoid<kFast>(kAlpha * x);
    return {x * s, s * (1 + kAlpha * x * (1 - s))};
  } else {
    const acc_t s = sigmoid<kFast>(x);
    return {x * s, s * (1 + x * (1 - s))};
  }
}

/// What comes before and beside the activation: see MoEOptions::activation_limit and glu_offset.
template <typename acc_t>
struct Limits {
  acc_t limit;  // infinite: none
  acc_t offset;

  // NaN stays NaN.
  __device__ __forceinline__ acc_t gate(acc_t x) const { return x > limit ? limit : x; }
  __device__ __forceinline__ bool passes_gate(acc_t x) const { return !(x > limit); }
  __device__ __forceinline__ acc_t up(acc_t x) const {
    return (x > limit ? limit : x < -limit ? -limit : x) + offset;
  }
  __device__ __forceinline__ bool passes_up(acc_t x) const { return !(x > limit || x < -limit); }
};

template <typename scalar_t>
constexpr bool kIs16Bit = sizeof(scalar_t) == 2;

}  // namespace anabranch::cuda
