#include "kernels/cuda/experts/bias.h"
#include "kernels/cuda/device.cuh"

namespace anabranch::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

__device__ __forceinline__ int64_t row_of_warp() {
  return static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
}

/// A warp per row.
template <typename scalar_t, int kSize>
__global__ void __launch_bounds__(kThreads)
    add_bias_kernel(scalar_t* __restrict__ rows, const scalar_t* __restrict__ bias,
                    const int64_t* __restrict__ offsets, int64_t experts, int64_t count,
                    int64_t width) {
  using acc_t = accumulate_t<scalar_t>;
  const int64_t row = row_of_warp();
  if (row >= count) {
    return;
  }
  scalar_t* target = rows + row * width;
  const scalar_t* addend = bias + owner_of(offsets, experts, row) * width;
  constexpr int kUnroll = 4;  // loads in flight
  constexpr int64_t kStep = kWarp * kSize;
  for (int64_t first = threadIdx.x % kWarp * kSize; first < width; first += kUnroll * kStep) {
    Pack<scalar_t, kSize> packs[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (first + u * kStep < width) {
        packs[u] = load_pack<kSize>(target + first + u * kStep);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t column = first + u * kStep;
      if (column < width) {
        acc_t a[kSize];
        acc_t b[kSize];
        unpack(packs[u], a);
        unpack(load_pack<kSize>(addend + column), b);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          a[i] += b[i];
        }
        store_pack(target + column, a);
      }
    }
  }
}

/// A warp per row.
template <typename scalar_t, int kSize>
__global__ void __launch_bounds__(kThreads)
    bias_dot_kernel(const scalar_t* __restrict__ rows, const scalar_t* __restrict__ bias,
                    const int64_t* __restrict__ offsets, int64_t experts, int64_t count,
                    int64_t width, accumulate_t<scalar_t>* __restrict__ out) {
  using acc_t = accumulate_t<scalar_t>;
  const int64_t row = row_of_warp();
  if (row >= count) {
    return;
  }
  const scalar_t* left = rows + row * width;
  const scalar_t* right = bias + owner_of(offsets, experts, row) * width;
  acc_t sum = 0;
#pragma unroll 4
  for (int64_t column = threadIdx.x % kWarp * kSize; column < width; column += kWarp * kSize) {
    acc_t a[kSize];
    acc_t b[kSize];
    unpack(load_pack<kSize>(left + column), a);
    unpack(load_pack<kSize>(right + column), b);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      sum += a[i] * b[i];
    }
  }
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) {
    out[row] = sum;
  }
}

/// The first chunk of each expert, whose rows are cut into pieces of kBiasChunk, one piece at least; and
/// zeros for the counters. One block.
__global__ void __launch_bounds__(kThreads)
    cut_chunks_kernel(const int64_t* __restrict__ offsets, int64_t experts, int64_t counters,
                      int64_t* __restrict__ chunks, unsigned* __restrict__ done) {
  for (int64_t i = threadIdx.x; i < counters; i += kThreads) {
    done[i] = 0;
  }
  if (threadIdx.x >= kWarp) {
    return;
  }
  const int lane = threadIdx.x;
  int64_t before = 0;
  for (int64_t base = 0; base <= experts; base += kWarp) {
    const int64_t expert = base + lane;
    int64_t own = 0;
    if (expert < experts) {
      const int64_t rows = offsets[expert + 1] - offsets[expert];
      own = max((rows + kBiasChunk - 1) / kBiasChunk, int64_t{1});
    }
    int64_t sum = own;
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const int64_t other = __shfl_up_sync(kFullMask, sum, distance);
      sum += lane >= distance ? other : 0;
    }
    if (expert <= experts) {
      chunks[expert] = before + sum - own;
    }
    before += __shfl_sync(kFullMask, sum, kWarp - 1);
  }
}

constexpr int kResident = 4;  // blocks of a multiprocessor at a time

/// A block sums one chunk of rows over one strip of 32 packs of columns. Each warp takes every
/// kWarps-th row; the warps' sums are added in order, and the chunks' by the block that is the last of
/// an expert's strip to be done, in order too. `done` [experts, strips] counts from 0. There are blocks
/// for more chunks than there may be.
template <typename scalar_t, int kSize>
__global__ void __launch_bounds__(kThreads, kResident)
    sum_chunks_kernel(const scalar_t* __restrict__ rows,
                      const accumulate_t<scalar_t>* __restrict__ weights,
                      const int64_t* __restrict__ offsets, const int64_t* __restrict__ chunks,
                      int64_t experts, int64_t strips, int64_t width, unsigned* __restrict__ done,
                      accumulate_t<scalar_t>* partial, scalar_t* __restrict__ out) {
  using acc_t = accumulate_t<scalar_t>;
  __shared__ acc_t sums[kWarps][kSize][kWarp];
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int64_t chunk = blockIdx.x / strips;
  if (chunk >= chunks[experts]) {
    return;
  }
  const int64_t expert = owner_of(chunks, experts, chunk);
  const int64_t begin = offsets[expert] + (chunk - chunks[expert]) * kBiasChunk;
  const int64_t end = min(begin + kBiasChunk, offsets[expert + 1]);
  const int64_t column = ((blockIdx.x - chunk * strips) * kWarp + lane) * kSize;
  acc_t sum[kSize] = {};
  if (column < width) {
#pragma unroll 8
    for (int64_t row = begin + warp; row < end; row += kWarps) {
      const acc_t weight = weights != nullptr ? weights[row] : acc_t{1};
      acc_t values[kSize];
      unpack(stream_pack<kSize>(rows + row * width + column), values);
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        sum[i] += weight * values[i];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    sums[warp][i][lane] = sum[i];
  }
  __syncthreads();
  for (int i = warp; i < kSize && column < width; i += kWarps) {
    acc_t total = 0;
    for (int w = 0; w < kWarps; ++w) {
      total += sums[w][i][lane];
    }
    partial[chunk * width + column + i] = total;
  }
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  const int64_t strip = blockIdx.x - chunk * strips;
  if (threadIdx.x == 0) {
    const auto before = atomicAdd(&done[expert * strips + strip], 1u);
    last = before == chunks[expert + 1] - chunks[expert] - 1;
  }
  __syncthreads();
  if (!last) {
    return;
  }
  __threadfence();
  const int64_t end_chunk = chunks[expert + 1];
  const int64_t strip_end = min(width, (strip + 1) * kWarp * kSize);
  for (int64_t i = strip * kWarp * kSize + threadIdx.x; i < strip_end; i += kThreads) {
    constexpr int kUnroll = 8;  // loads in flight
    acc_t total = 0;
    for (int64_t c = chunks[expert]; c < end_chunk; c += kUnroll) {
      acc_t parts[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        parts[u] = c + u < end_chunk ? __ldcg(partial + (c + u) * width + i) : acc_t{0};
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        total += parts[u];
      }
    }
    out[expert * width + i] = static_cast<scalar_t>(total);
  }
}

}  // namespace

void launch_add_bias(Scalar scalar, void* rows, const void* bias, const int64_t* offsets,
                     int64_t experts, int64_t count, int64_t width, cudaStream_t stream) {
  if (count == 0 || width == 0) {
    return;
  }
  dispatch(scalar, [&](auto zero) {
    using scalar_t = decltype(zero);
    const int64_t row_bytes = width * static_cast<int64_t>(sizeof(scalar_t));
    dispatch_pack<scalar_t>(aligned_rows(row_bytes, rows, bias), [&](auto pack_size) {
      constexpr int kSize = decltype(pack_size)::value;
      add_bias_kernel<scalar_t, kSize>
          <<<grid_size(divide_up(count, kWarps)), kThreads, 0, stream>>>(
              static_cast<scalar_t*>(rows), static_cast<const scalar_t*>(bias), offsets, experts,
              count, width);
      check_launch("add_bias");
    });
  });
}

void launch_bias_dot(Scalar scalar, const void* rows, const void* bias, const int64_t* offsets,
                     int64_t experts, int64_t count, int64_t width, void* out,
                     cudaStream_t stream) {
  if (count == 0) {
    return;
  }
  dispatch(scalar, [&](auto zero) {
    using scalar_t = decltype(zero);
    const int64_t row_bytes = width * static_cast<int64_t>(sizeof(scalar_t));
    dispatch_pack<scalar_t>(aligned_rows(row_bytes, rows, bias), [&](auto pack_size) {
      constexpr int kSize = decltype(pack_size)::value;
      bias_dot_kernel<scalar_t, kSize>
          <<<grid_size(divide_up(count, kWarps)), kThreads, 0, stream>>>(
              static_cast<const scalar_t*>(rows), static_cast<const scalar_t*>(bias), offsets,
              experts, count, width, static_cast<accumulate_t<scalar_t>*>(out));
      check_launch("bias_dot");
    });
  });
}

int64_t bias_strips(Scalar scalar, const void* rows, int64_t width) {
  int64_t strips = 0;
  dispatch(scalar, [&](auto zero) {
    using scalar_t = decltype(zero);
    const int64_t row_bytes = width * static_cast<int64_t>(sizeof(scalar_t));
    dispatch_pack<scalar_t>(aligned_rows(row_bytes, rows), [&](auto pack_size) {
      strips = divide_up(width, kWarp * decltype(pack_size)::value);
    });
  });
  return strips;
}

void launch_bias_gradient(Scalar scalar, const void* rows, const void* weights,
                          const int64_t* offsets, int64_t count, int64_t experts, int64_t width,
                          const BiasScratch& scratch, void* out, cudaStream_t stream) {
  if (experts == 0 || width == 0) {
    return;
  }
  dispatch(scalar, [&](auto zero) {
    using scalar_t = decltype(zero);
    using acc_t = accumulate_t<scalar_t>;
    const int64_t row_bytes = width * static_cast<int64_t>(sizeof(scalar_t));
    dispatch_pack<scalar_t>(aligned_rows(row_bytes, rows), [&](auto pack_size) {
      constexpr int kSize = decltype(pack_size)::value;
      const int64_t strips = bias_strips(scalar, rows, width);
      cut_chunks_kernel<<<1, kThreads, 0, stream>>>(offsets, experts, experts * strips,
                                                    scratch.chunks, scratch.done);
      check_launch("cut_chunks");
      const int64_t chunks = most_bias_chunks(count, experts);
      sum_chunks_kernel<scalar_t, kSize><<<grid_size(chunks * strips), kThreads, 0, stream>>>(
          static_cast<const scalar_t*>(rows), static_cast<const acc_t*>(weights), offsets,
          scratch.chunks, experts, strips, width, scratch.done,
          static_cast<acc_t*>(scratch.partial), static_cast<scalar_t*>(out));
      check_launch("bias_gradient");
    });
  });
}

}  // namespace anabranch::cuda
