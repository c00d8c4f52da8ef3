#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <limits>
#include <stdexcept>
#include <string>

#include "kernels/cuda/launch.h"
#include "support/cuda_check.h"

// What the device code of every stage has in common.

namespace anabranch::cuda {

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;

template <typename scalar_t>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
/// fp64 for fp64, fp32 for everything else.
template <typename scalar_t>
using accumulate_t = typename Accumulator<scalar_t>::type;

/// `kSize` neighbours that are loaded and stored at once.
template <typename scalar_t, int kSize>
struct alignas(sizeof(scalar_t) * kSize) Pack {
  scalar_t values[kSize];
};

/// Elements of a 16-byte access.
template <typename scalar_t>
constexpr int kPackSize = 16 / sizeof(scalar_t);

template <typename scalar_t, int kSize>
__device__ __forceinline__ void unpack(const Pack<scalar_t, kSize>& pack,
                                       accumulate_t<scalar_t> (&out)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    out[i] = static_cast<accumulate_t<scalar_t>>(pack.values[i]);
  }
}

template <typename scalar_t, int kSize>
__device__ __forceinline__ Pack<scalar_t, kSize> pack_of(
    const accumulate_t<scalar_t> (&values)[kSize]) {
  Pack<scalar_t, kSize> pack;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    pack.values[i] = static_cast<scalar_t>(values[i]);
  }
  return pack;
}

/// The sum over a warp, the same on every lane, in a fixed order.
template <typename value_t>
__device__ __forceinline__ value_t warp_sum(value_t value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kFullMask, value, offset);
  }
  return value;
}

/// The number of elements of sorted `values` [count] that are ≤ `value`.
__device__ __forceinline__ int64_t upper_bound(const int64_t* values, int64_t count,
                                               int64_t value) {
  int64_t low = 0;
  for (int64_t high = count; low < high;) {
    const int64_t middle = (low + high) / 2;
    if (values[middle] <= value) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

/// The expert that owns row `row`, given offsets [experts+1].
__device__ __forceinline__ int64_t owner_of(const int64_t* offsets, int64_t experts, int64_t row) {
  return upper_bound(offsets + 1, experts, row);
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// A grid dimension, checked against what a launch can take.
inline unsigned grid_size(int64_t blocks, int64_t most = std::numeric_limits<int32_t>::max()) {
  if (blocks > most) {
    throw std::runtime_error("a CUDA grid of " + std::to_string(blocks) + " blocks is more than " +
                             std::to_string(most));
  }
  return static_cast<unsigned>(blocks);
}

/// Whether packs of 16 bytes reach all of rows of `row_bytes` at every one of these pointers.
template <typename... Pointers>
bool aligned_rows(int64_t row_bytes, const Pointers*... pointers) {
  return row_bytes % 16 == 0 && ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

/// Calls `body(scalar_t{})` with the C++ type of `scalar`.
template <typename Body>
void dispatch(Scalar scalar, const Body& body) {
  switch (scalar) {
    case Scalar::kFloat:
      return body(float{});
    case Scalar::kDouble:
      return body(double{});
    case Scalar::kBFloat16:
      return body(__nv_bfloat16{});
    case Scalar::kHalf:
      return body(__half{});
  }
}

/// Calls `body` with the elements of a pack as a compile-time constant: 16 bytes' worth, or 1.
template <typename scalar_t, typename Body>
void dispatch_pack(bool aligned, const Body& body) {
  if (aligned) {
    body(std::integral_constant<int, kPackSize<scalar_t>>{});
  } else {
    body(std::integral_constant<int, 1>{});
  }
}

}  // namespace anabranch::cuda
