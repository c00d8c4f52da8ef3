#pragma once

// Activations and their derivatives of eight neighbouring elements, as an epilogue takes them.
#include <type_traits>

#include "kernels/cuda/experts/activation.cuh"

namespace anabranch::tiles {

using cuda::ActivationKind;

/// Calls `body` with the activation as a compile-time constant.
template <typename Body>
__device__ __forceinline__ void with_activation(ActivationKind kind, const Body& body) {
  switch (kind) {
    case ActivationKind::kGeluTanh:
      return body(std::integral_constant<ActivationKind, ActivationKind::kGeluTanh>{});
    case ActivationKind::kGelu:
      return body(std::integral_constant<ActivationKind, ActivationKind::kGelu>{});
    case ActivationKind::kRelu:
      return body(std::integral_constant<ActivationKind, ActivationKind::kRelu>{});
    case ActivationKind::kSilu:
      return body(std::integral_constant<ActivationKind, ActivationKind::kSilu>{});
    default:
      break;  // not fused: see HiddenActivation::is_plain
  }
}

/// Eight neighbouring elements of a 16-bit type.
template <typename scalar_t>
struct Eight {
  uint4 words;

  __device__ void unpack(float (&values)[8]) const {
    cuda::unpack_word(words.x, values[0], values[1], scalar_t{});
    cuda::unpack_word(words.y, values[2], values[3], scalar_t{});
    cuda::unpack_word(words.z, values[4], values[5], scalar_t{});
    cuda::unpack_word(words.w, values[6], values[7], scalar_t{});
  }
  __device__ static Eight pack(const float (&values)[8]) {
    return {{cuda::pack_word(values[0], values[1], scalar_t{}),
             cuda::pack_word(values[2], values[3], scalar_t{}),
             cuda::pack_word(values[4], values[5], scalar_t{}),
             cuda::pack_word(values[6], values[7], scalar_t{})}};
  }
};

/// x becomes its activation, with GLU times `up`.
template <ActivationKind kKind, bool kGlu>
__device__ __forceinline__ void activate_eight(float (&x)[8], const float (&up)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    x[i] = cuda::activate_at<kKind, true>(x[i]).value;
    if constexpr (kGlu) {
      x[i] *= up[i];
    }
  }
}

/// Backward of `weight` · activation. `products` are the gradient there, and become weight · activation; the
/// hidden values `gate` and with GLU `up` become their gradients. Returns ⟨products, activation⟩.
template <ActivationKind kKind, bool kGlu>
__device__ __forceinline__ float differentiate_eight(float (&gate)[8], float (&up)[8],
                                                     float (&products)[8], float weight) {
  float dot = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const auto [value, slope] = cuda::activate_at<kKind, true>(gate[i]);
    const float scaled = weight * products[i];
    float result = value;
    gate[i] = scaled * slope;
    if constexpr (kGlu) {
      result *= up[i];
      gate[i] *= up[i];
      up[i] = scaled * value;
    }
    dot += products[i] * result;
    products[i] = weight * result;
  }
  return dot;
}

}  // namespace anabranch::tiles
