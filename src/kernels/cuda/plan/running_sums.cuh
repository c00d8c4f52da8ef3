#pragma once

#include "kernels/cuda/device.cuh"

namespace anabranch::cuda {

/// Exclusive running sum over the block's threads; `total` is the sum of all.
template <int kThreads>
__device__ int64_t block_exclusive_sum(int64_t value, int64_t& total) {
  constexpr int kWarps = kThreads / kWarp;
  __shared__ int64_t warp_totals[kWarps];
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  int64_t inclusive = value;
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int64_t below = __shfl_up_sync(kFullMask, inclusive, offset);
    inclusive += lane >= offset ? below : 0;
  }
  __syncthreads();  // of an earlier call's readers
  if (lane == kWarp - 1) {
    warp_totals[warp] = inclusive;
  }
  __syncthreads();
  int64_t before = 0;
  total = 0;
  for (int w = 0; w < kWarps; ++w) {
    before += w < warp ? warp_totals[w] : 0;
    total += warp_totals[w];
  }
  return before + inclusive - value;
}

/// Inclusive running sums, by one block, of `count` values. All threads call it.
template <int kThreads, typename value_t>
__device__ void block_running_sums(int64_t count, const value_t& value, int64_t* sums) {
  int64_t carry = 0;
  for (int64_t base = 0; base < count; base += kThreads) {
    const int64_t i = base + threadIdx.x;
    const int64_t own = i < count ? value(i) : 0;
    int64_t total;
    const int64_t before = block_exclusive_sum<kThreads>(own, total);
    if (i < count) {
      sums[i] = carry + before + own;
    }
    carry += total;
  }
}

}  // namespace anabranch::cuda
