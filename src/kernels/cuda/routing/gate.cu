#include "kernels/cuda/routing/gate.cuh"
#include "kernels/cuda/routing/gate.h"

namespace anabranch::cuda {
namespace {

constexpr int kThreads = 256;

/// A thread an element. `row_step` and `place_step`: elements from one row, or place, to the next.
__global__ void __launch_bounds__(kThreads)
    split_kernel(const float* __restrict__ x, int64_t count, int64_t n, Places places,
                 int64_t row_step, int64_t place_step, __nv_bfloat16* __restrict__ out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) {
    return;
  }
  const Bf16Parts parts(x[i]);
  const int64_t row = i / n;
  __nv_bfloat16* target = out + row * row_step + (i - row * n);
#pragma unroll
  for (int place = 0; place < 4; ++place) {
    target[place * place_step] = parts[places.part[place]];
  }
}

/// A thread an element. Of each place, four running sums take the pieces by turns.
__global__ void __launch_bounds__(kThreads)
    sum_split_kernel(const float* __restrict__ pieces, int64_t num_pieces,
                     const float* __restrict__ rest, int64_t count, int3 order,
                     float* __restrict__ out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) {
    return;
  }
  const auto place_sum = [&](int place) {
    const float* values = pieces + place * count + i;
    float sums[4] = {0, 0, 0, 0};
    for (int64_t first = 0; first < num_pieces; first += 4) {
#pragma unroll
      for (int turn = 0; turn < 4; ++turn) {
        if (first + turn < num_pieces) sums[turn] += values[(first + turn) * 3 * count];
      }
    }
    const float sum = sums[0] + sums[1] + sums[2] + sums[3];
    return rest != nullptr ? sum + rest[place * count + i] : sum;
  };
  out[i] = place_sum(order.x) + place_sum(order.y) + place_sum(order.z);
}

/// A thread an element.
__global__ void __launch_bounds__(kThreads)
    sum_parts_kernel(const float* __restrict__ parts, int64_t count, int64_t n,
                     float* __restrict__ out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) {
    const int64_t row = i / n;
    out[i] = sum_of_parts(parts + row * 3 * n + (i - row * n), n);
  }
}

}  // namespace

void launch_split(const float* x, int64_t m, int64_t n, const int* parts, bool side_by_side,
                  void* out, cudaStream_t stream) {
  const int64_t count = m * n;
  if (count == 0) {
    return;
  }
  split_kernel<<<grid_size(divide_up(count, kThreads)), kThreads, 0, stream>>>(
      x, count, n, {parts[0], parts[1], parts[2], parts[3]}, side_by_side ? 4 * n : n,
      side_by_side ? n : count, static_cast<__nv_bfloat16*>(out));
  check_launch("split");
}

void launch_sum_split(const float* pieces, int64_t num_pieces, const float* rest, int64_t count,
                      const int* order, float* out, cudaStream_t stream) {
  if (count == 0) {
    return;
  }
  sum_split_kernel<<<grid_size(divide_up(count, kThreads)), kThreads, 0, stream>>>(
      pieces, num_pieces, rest, count, make_int3(order[0], order[1], order[2]), out);
  check_launch("sum_split");
}

void launch_sum_parts(const float* parts, int64_t m, int64_t n, float* out, cudaStream_t stream) {
  const int64_t count = m * n;
  if (count == 0) {
    return;
  }
  sum_parts_kernel<<<grid_size(divide_up(count, kThreads)), kThreads, 0, stream>>>(parts, count, n,
                                                                                   out);
  check_launch("sum_parts");
}

}  // namespace anabranch::cuda
