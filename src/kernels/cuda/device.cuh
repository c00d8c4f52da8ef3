#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "kernels/cuda/launch.h"
#include "support/cuda/check.h"

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

/// Elements of a 16-byte access.
template <typename scalar_t>
constexpr int kPackSize = 16 / sizeof(scalar_t);

/// `kSize` neighbours in one access of 16 bytes, or one element. Words, not elements: of an array of
/// 16-bit elements the compiler makes 16-bit loads.
template <typename scalar_t, int kSize>
struct Pack {
  static_assert(kSize == kPackSize<scalar_t>);
  uint4 words;
};
template <typename scalar_t>
struct Pack<scalar_t, 1> {
  scalar_t element;
};

template <int kSize, typename scalar_t>
__device__ __forceinline__ Pack<scalar_t, kSize> load_pack(const scalar_t* address) {
  return *reinterpret_cast<const Pack<scalar_t, kSize>*>(address);
}

/// The same of what is read once: it leaves the cache first.
template <int kSize, typename scalar_t>
__device__ __forceinline__ Pack<scalar_t, kSize> stream_pack(const scalar_t* address) {
  if constexpr (kSize == 1) {
    return {__ldcs(address)};
  } else {
    return {__ldcs(reinterpret_cast<const uint4*>(address))};
  }
}

// Two 16-bit elements of a word: plain shifts for bf16, whose conversion instruction is slow.
__device__ __forceinline__ void unpack_word(unsigned word, float& low, float& high, __nv_bfloat16) {
  low = __uint_as_float(word << 16);
  high = __uint_as_float(word & 0xffff0000u);
}
__device__ __forceinline__ void unpack_word(unsigned word, float& low, float& high, __half) {
  const float2 both = __half22float2(*reinterpret_cast<const __half2*>(&word));
  low = both.x;
  high = both.y;
}
__device__ __forceinline__ unsigned pack_word(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const unsigned*>(&both);
}
__device__ __forceinline__ unsigned pack_word(float low, float high, __half) {
  const __half2 both = __floats2half2_rn(low, high);
  return *reinterpret_cast<const unsigned*>(&both);
}

template <typename scalar_t, int kSize>
__device__ __forceinline__ void unpack(const Pack<scalar_t, kSize>& pack,
                                       accumulate_t<scalar_t> (&out)[kSize]) {
  if constexpr (kSize == 1) {
    out[0] = static_cast<accumulate_t<scalar_t>>(pack.element);
  } else {
    const unsigned words[4] = {pack.words.x, pack.words.y, pack.words.z, pack.words.w};
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if constexpr (std::is_same_v<scalar_t, float>) {
        out[i] = __uint_as_float(words[i]);
      } else if constexpr (std::is_same_v<scalar_t, double>) {
        out[i] = __hiloint2double(words[2 * i + 1], words[2 * i]);
      } else if (i % 2 == 0) {
        unpack_word(words[i / 2], out[i], out[i + 1], scalar_t{});
      }
    }
  }
}

template <typename scalar_t, int kSize>
__device__ __forceinline__ void store_pack(scalar_t* address,
                                           const accumulate_t<scalar_t> (&values)[kSize]) {
  if constexpr (kSize == 1) {
    *address = static_cast<scalar_t>(values[0]);
  } else {
    unsigned words[4];
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if constexpr (std::is_same_v<scalar_t, float>) {
        words[i] = __float_as_uint(values[i]);
      } else if constexpr (std::is_same_v<scalar_t, double>) {
        words[2 * i] = __double2loint(values[i]);
        words[2 * i + 1] = __double2hiint(values[i]);
      } else if (i % 2 == 0) {
        words[i / 2] = pack_word(values[i], values[i + 1], scalar_t{});
      }
    }
    *reinterpret_cast<uint4*>(address) = make_uint4(words[0], words[1], words[2], words[3]);
  }
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

/// The expert that owns row `row`, given offsets [experts+1]: a whole warp looks at 32 experts at a
/// time, so that few loads wait for one another.
__device__ __forceinline__ int64_t owner_of(const int64_t* offsets, int64_t experts, int64_t row) {
  const int lane = threadIdx.x % kWarp;
  int64_t first = 0;
  int64_t count = experts;  // first ≤ owner < first + count
  while (count > 1) {
    const int64_t step = (count + kWarp - 1) / kWarp;
    const int64_t expert = first + (lane + 1) * step;
    const bool before = expert < first + count && offsets[expert] <= row;
    const int steps = __popc(__ballot_sync(kFullMask, before));
    count = min(step, count - steps * step);
    first += steps * step;
  }
  return first;
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Of a grid's second dimension.
constexpr int64_t kMostGridRows = 65535;

/// A grid dimension, checked against what a launch can take.
inline unsigned grid_size(int64_t blocks, int64_t most = std::numeric_limits<int32_t>::max()) {
  if (blocks > most) {
    throw std::runtime_error("a CUDA grid of " + std::to_string(blocks) + " blocks is more than " +
                             std::to_string(most));
  }
  return static_cast<unsigned>(blocks);
}

/// Of the current device.
inline int64_t multiprocessors() {
  int device = 0;
  int count = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
             "cudaDeviceGetAttribute");
  return count;
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
