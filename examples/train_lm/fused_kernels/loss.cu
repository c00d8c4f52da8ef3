#include <cmath>

#include "kernels/cuda/device.cuh"
#include "fused_kernels/cuda.cuh"

namespace train_lm::cuda {
namespace {

using namespace anabranch::cuda;

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;

/// Σ exp(x − maximum) of the numbers seen so far.
struct Normalizer {
  float maximum = -INFINITY;
  float sum = 0;

  __device__ __forceinline__ void add(const Normalizer& other) {
    const float larger = fmaxf(maximum, other.maximum);
    if (larger == -INFINITY) {
      return;  // nothing yet
    }
    sum = sum * __expf(maximum - larger) + other.sum * __expf(other.maximum - larger);
    maximum = larger;
  }
};

/// Of the block, on every thread; warps are added in their order.
__device__ Normalizer of_block(Normalizer own) {
  __shared__ Normalizer warps[kWarps];
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    own.add({__shfl_xor_sync(kFullMask, own.maximum, offset),
             __shfl_xor_sync(kFullMask, own.sum, offset)});
  }
  if (threadIdx.x % kWarp == 0) {
    warps[threadIdx.x / kWarp] = own;
  }
  __syncthreads();
  Normalizer all;
  for (int warp = 0; warp < kWarps; ++warp) {
    all.add(warps[warp]);
  }
  return all;
}

/// A block for each row. NaN and infinity among the logits make a loss and a gradient of NaN.
template <int kSize>
__global__ void __launch_bounds__(kThreads)
    cross_entropy_kernel(int64_t vocabulary, __nv_bfloat16* __restrict__ logits,
                         const int64_t* __restrict__ targets, float scale, bool with_gradient,
                         float* __restrict__ losses) {
  __nv_bfloat16* const row = logits + static_cast<int64_t>(blockIdx.x) * vocabulary;
  const int64_t target = targets[blockIdx.x];
  Normalizer own;
  for (int64_t i = threadIdx.x * kSize; i < vocabulary; i += kThreads * kSize) {
    float x[kSize];
    unpack(load_pack<kSize>(row + i), x);
    Normalizer pack;
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      pack.maximum = fmaxf(pack.maximum, x[k]);
    }
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      pack.sum += __expf(x[k] - pack.maximum);
    }
    own.add(pack);
  }
  const float wanted = static_cast<float>(row[target]);
  const Normalizer all = of_block(own);  // after it, nobody reads `wanted` any more
  const float log_sum = all.maximum + logf(all.sum);
  if (threadIdx.x == 0) {
    losses[blockIdx.x] = log_sum - wanted;
  }
  if (!with_gradient) {
    return;
  }
  for (int64_t i = threadIdx.x * kSize; i < vocabulary; i += kThreads * kSize) {
    float x[kSize];
    unpack(load_pack<kSize>(row + i), x);
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      x[k] = scale * (__expf(x[k] - log_sum) - (i + k == target ? 1.f : 0.f));
    }
    store_pack(row + i, x);
  }
}

}  // namespace

void launch_cross_entropy(int64_t tokens, int64_t vocabulary, void* logits, const int64_t* targets,
                          float scale, bool with_gradient, float* losses, cudaStream_t stream) {
  if (tokens == 0) {
    return;
  }
  const int64_t row_bytes = vocabulary * static_cast<int64_t>(sizeof(__nv_bfloat16));
  dispatch_pack<__nv_bfloat16>(aligned_rows(row_bytes, logits), [&](auto size) {
    cross_entropy_kernel<decltype(size)::value><<<grid_size(tokens), kThreads, 0, stream>>>(
        vocabulary, static_cast<__nv_bfloat16*>(logits), targets, scale, with_gradient, losses);
    anabranch::check_launch("cross_entropy");
  });
}

}  // namespace train_lm::cuda
