#include <algorithm>
#include <stdexcept>
#include <string>

#include "kernels/cuda/device.cuh"
#include "fused_kernels/cuda.cuh"

namespace train_lm::cuda {
namespace {

using anabranch::cuda::grid_size;
using anabranch::cuda::kWarp;
using anabranch::cuda::multiprocessors;
using anabranch::cuda::warp_sum;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kBlocksOfAMultiprocessor = 4;

/// A lane's share of a head: kSize neighbours, thus whole pairs.
template <int kSize>
struct alignas(2 * kSize) Share {
  __nv_bfloat162 pairs[kSize / 2];
};

template <int kSize>
__device__ __forceinline__ void load(const __nv_bfloat16* address, float (&values)[kSize]) {
  const auto share = *reinterpret_cast<const Share<kSize>*>(address);
#pragma unroll
  for (int i = 0; i < kSize / 2; ++i) {
    const float2 pair = __bfloat1622float2(share.pairs[i]);
    values[2 * i] = pair.x;
    values[2 * i + 1] = pair.y;
  }
}

template <int kSize>
__device__ __forceinline__ void store(__nv_bfloat16* address, const float (&values)[kSize]) {
  Share<kSize> share;
#pragma unroll
  for (int i = 0; i < kSize / 2; ++i) {
    share.pairs[i] = __floats2bfloat162_rn(values[2 * i], values[2 * i + 1]);
  }
  *reinterpret_cast<Share<kSize>*>(address) = share;
}

/// Turns pairs by the angle at `rotation`, or back.
template <bool kBack, int kSize>
__device__ __forceinline__ void turn(float (&values)[kSize], const float* rotation) {
#pragma unroll
  for (int i = 0; i < kSize; i += 2) {
    const float cosine = rotation[i];
    const float sine = kBack ? -rotation[i + 1] : rotation[i + 1];
    const float x = values[i], y = values[i + 1];
    values[i] = x * cosine - y * sine;
    values[i + 1] = x * sine + y * cosine;
  }
}

/// Where a warp stands: a head of a token, and its lane's share of it.
template <int kSize>
struct Place {
  __device__ Place(const HeadsShape& shape, int64_t token, int head)
      : is_query(head < shape.heads),
        column((threadIdx.x % kWarp) * kSize),
        of_qkv((token * (shape.heads + 2 * shape.key_heads) + head) * shape.width + column),
        of_part((token * (is_query ? shape.heads : shape.key_heads) + number(shape, head)) *
                    shape.width +
                column),
        of_norm((shape.norm == HeadNorm::kAll ? number(shape, head) * shape.width : 0) + column),
        of_rotation((token % shape.length) * shape.width + column) {}

  /// Among queries, or among keys.
  __device__ static int number(const HeadsShape& shape, int head) {
    return head < shape.heads ? head : head - shape.heads;
  }

  bool is_query;
  int column;
  int64_t of_qkv, of_part, of_norm, of_rotation;
};

template <int kSize>
__device__ __forceinline__ float dot(const float (&a)[kSize], const float (&b)[kSize]) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    sum += a[i] * b[i];
  }
  return sum;
}

/// Sums over the block of `kCount` numbers that each warp has, on every thread; in the order of the warps.
template <int kCount>
__device__ __forceinline__ void sum_over_block(float (&values)[kCount]) {
  __shared__ float sums[kWarps][kCount];
  __syncthreads();  // what was there has been read
  if (threadIdx.x % kWarp == 0) {
    for (int i = 0; i < kCount; ++i) {
      sums[threadIdx.x / kWarp][i] = values[i];
    }
  }
  __syncthreads();
  for (int i = 0; i < kCount; ++i) {
    values[i] = 0;
    for (int warp = 0; warp < kWarps; ++warp) {
      values[i] += sums[warp][i];
    }
  }
}

/// A block takes tokens, a warp of it heads.
template <int kSize, HeadNorm kNorm>
__global__ void __launch_bounds__(kThreads)
    heads_kernel(HeadsShape shape, const __nv_bfloat16* __restrict__ qkv,
                 const __nv_bfloat16* __restrict__ query_norm,
                 const __nv_bfloat16* __restrict__ key_norm, const float* __restrict__ rotation,
                 __nv_bfloat16* __restrict__ query, __nv_bfloat16* __restrict__ key) {
  const int warp = threadIdx.x / kWarp;
  for (int64_t token = blockIdx.x; token < shape.tokens; token += gridDim.x) {
    float squares[2] = {0, 0};  // of all queries, of all keys
    if constexpr (kNorm == HeadNorm::kAll) {
      for (int head = warp; head < shape.heads + shape.key_heads; head += kWarps) {
        const Place<kSize> place(shape, token, head);
        float x[kSize];
        load(qkv + place.of_qkv, x);
        squares[place.is_query ? 0 : 1] += warp_sum(dot(x, x));
      }
      sum_over_block(squares);
    }
    for (int head = warp; head < shape.heads + shape.key_heads; head += kWarps) {
      const Place<kSize> place(shape, token, head);
      float x[kSize];
      load(qkv + place.of_qkv, x);
      if constexpr (kNorm != HeadNorm::kNone) {
        const int count = place.is_query ? shape.heads : shape.key_heads;
        const float mean = kNorm == HeadNorm::kEach
                               ? warp_sum(dot(x, x)) / shape.width
                               : squares[place.is_query ? 0 : 1] / (count * shape.width);
        const float inverse = rsqrtf(mean + shape.epsilon);
        float weight[kSize];
        load((place.is_query ? query_norm : key_norm) + place.of_norm, weight);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          x[i] *= inverse * weight[i];
        }
      }
      turn<false>(x, rotation + place.of_rotation);
      store((place.is_query ? query : key) + place.of_part, x);
    }
  }
}

/// Of y = x · inverse · weight, inverse = 1/√(mean x² + ε): dx = inverse · (g − x · inverse² · mean(g · x)),
/// g = dy · weight; dweight = Σ dy · x · inverse, which each warp adds up for its heads in shared memory.
template <int kSize, HeadNorm kNorm>
__global__ void __launch_bounds__(kThreads)
    heads_backward_kernel(HeadsShape shape, const __nv_bfloat16* __restrict__ dquery,
                          const __nv_bfloat16* __restrict__ dkey,
                          const __nv_bfloat16* __restrict__ dvalue,
                          const __nv_bfloat16* __restrict__ qkv,
                          const __nv_bfloat16* __restrict__ query_norm,
                          const __nv_bfloat16* __restrict__ key_norm,
                          const float* __restrict__ rotation, __nv_bfloat16* __restrict__ dqkv,
                          float* __restrict__ dnorm) {
  extern __shared__ float dweights[];  // [heads + key_heads, width]
  const int warp = threadIdx.x / kWarp;
  const int turned = shape.heads + shape.key_heads;
  const int numbers = turned * shape.width;
  if constexpr (kNorm != HeadNorm::kNone) {
    for (int i = threadIdx.x; i < numbers; i += kThreads) {
      dweights[i] = 0;
    }
    __syncthreads();
  }
  for (int64_t token = blockIdx.x; token < shape.tokens; token += gridDim.x) {
    float sums[4] = {0, 0, 0, 0};  // x² and g · x of all queries, of all keys
    if constexpr (kNorm == HeadNorm::kAll) {
      for (int head = warp; head < turned; head += kWarps) {
        const Place<kSize> place(shape, token, head);
        float x[kSize], dy[kSize], weight[kSize];
        load(qkv + place.of_qkv, x);
        load((place.is_query ? dquery : dkey) + place.of_part, dy);
        load((place.is_query ? query_norm : key_norm) + place.of_norm, weight);
        turn<true>(dy, rotation + place.of_rotation);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          dy[i] *= weight[i];
        }
        sums[place.is_query ? 0 : 2] += warp_sum(dot(x, x));
        sums[place.is_query ? 1 : 3] += warp_sum(dot(dy, x));
      }
      sum_over_block(sums);
    }
    for (int head = warp; head < turned; head += kWarps) {
      const Place<kSize> place(shape, token, head);
      float dy[kSize];
      load((place.is_query ? dquery : dkey) + place.of_part, dy);
      turn<true>(dy, rotation + place.of_rotation);
      if constexpr (kNorm != HeadNorm::kNone) {
        float x[kSize], weight[kSize];
        load(qkv + place.of_qkv, x);
        load((place.is_query ? query_norm : key_norm) + place.of_norm, weight);
        float g[kSize];
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          g[i] = dy[i] * weight[i];
        }
        const bool each = kNorm == HeadNorm::kEach;
        const int count =
            each ? shape.width : (place.is_query ? shape.heads : shape.key_heads) * shape.width;
        const float squares = each ? warp_sum(dot(x, x)) : sums[place.is_query ? 0 : 2];
        const float product = each ? warp_sum(dot(g, x)) : sums[place.is_query ? 1 : 3];
        const float inverse = rsqrtf(squares / count + shape.epsilon);
        const float factor = inverse * inverse * product / count;
        float* const sum = dweights + head * shape.width + place.column;
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          sum[i] += dy[i] * x[i] * inverse;
          dy[i] = inverse * (g[i] - x[i] * factor);
        }
      }
      store(dqkv + place.of_qkv, dy);
    }
    for (int head = warp; head < shape.key_heads; head += kWarps) {
      const int column = (threadIdx.x % kWarp) * kSize;
      const int64_t row = token * (turned + shape.key_heads) + turned + head;
      *reinterpret_cast<Share<kSize>*>(dqkv + row * shape.width + column) =
          *reinterpret_cast<const Share<kSize>*>(
              dvalue + (token * shape.key_heads + head) * shape.width + column);
    }
  }
  if constexpr (kNorm != HeadNorm::kNone) {
    __syncthreads();
    for (int i = threadIdx.x; i < numbers; i += kThreads) {
      dnorm[static_cast<int64_t>(blockIdx.x) * numbers + i] = dweights[i];
    }
  }
}

/// Calls `body` with a lane's share of a head and the norm as compile-time constants.
template <typename Body>
void dispatch(const HeadsShape& shape, const Body& body) {
  const auto with_norm = [&](auto size) {
    switch (shape.norm) {
      case HeadNorm::kNone:
        return body(size, std::integral_constant<HeadNorm, HeadNorm::kNone>{});
      case HeadNorm::kEach:
        return body(size, std::integral_constant<HeadNorm, HeadNorm::kEach>{});
      case HeadNorm::kAll:
        return body(size, std::integral_constant<HeadNorm, HeadNorm::kAll>{});
    }
  };
  switch (shape.width) {
    case 64:
      return with_norm(std::integral_constant<int, 2>{});
    case 128:
      return with_norm(std::integral_constant<int, 4>{});
    case 256:
      return with_norm(std::integral_constant<int, 8>{});
    default:
      throw std::invalid_argument("heads on a GPU are of 64, 128 or 256 numbers, not of " +
                                  std::to_string(shape.width));
  }
}

const __nv_bfloat16* bf16(const void* address) {
  return static_cast<const __nv_bfloat16*>(address);
}
__nv_bfloat16* bf16(void* address) { return static_cast<__nv_bfloat16*>(address); }

}  // namespace

int64_t heads_blocks(const HeadsShape& shape) {
  return std::min(shape.tokens, multiprocessors() * kBlocksOfAMultiprocessor);
}

void launch_heads(const HeadsShape& shape, const void* qkv, const void* query_norm,
                  const void* key_norm, const float* rotation, void* query, void* key,
                  cudaStream_t stream) {
  if (shape.tokens == 0) {
    return;
  }
  dispatch(shape, [&](auto size, auto norm) {
    // More blocks than run at a time: tokens are many, and no sum is kept.
    const unsigned blocks = grid_size(std::min<int64_t>(shape.tokens, 8 * heads_blocks(shape)));
    heads_kernel<decltype(size)::value, decltype(norm)::value><<<blocks, kThreads, 0, stream>>>(
        shape, bf16(qkv), bf16(query_norm), bf16(key_norm), rotation, bf16(query), bf16(key));
    anabranch::check_launch("heads");
  });
}

void launch_heads_backward(const HeadsShape& shape, const void* dquery, const void* dkey,
                           const void* dvalue, const void* qkv, const void* query_norm,
                           const void* key_norm, const float* rotation, void* dqkv, float* dnorm,
                           cudaStream_t stream) {
  if (shape.tokens == 0) {
    return;
  }
  const size_t memory = shape.norm == HeadNorm::kNone
                            ? 0
                            : sizeof(float) * (shape.heads + shape.key_heads) * shape.width;
  dispatch(shape, [&](auto size, auto norm) {
    const auto kernel = heads_backward_kernel<decltype(size)::value, decltype(norm)::value>;
    anabranch::check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                               static_cast<int>(memory)),
                          "cudaFuncSetAttribute");
    kernel<<<grid_size(heads_blocks(shape)), kThreads, memory, stream>>>(
        shape, bf16(dquery), bf16(dkey), bf16(dvalue), bf16(qkv), bf16(query_norm), bf16(key_norm),
        rotation, bf16(dqkv), dnorm);
    anabranch::check_launch("heads_backward");
  });
}

}  // namespace train_lm::cuda
