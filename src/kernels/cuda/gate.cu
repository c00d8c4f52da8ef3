#include "kernels/cuda/device.cuh"
#include "kernels/cuda/gate.h"

namespace anabranch::cuda {
namespace {

constexpr int kThreads = 256;

struct Places {
  int part[3];
};

/// A thread an element. `row_step` and `place_step`: elements from one row, or place, to the next.
__global__ void __launch_bounds__(kThreads)
    split_kernel(const float* __restrict__ x, int64_t count, int64_t n, Places places,
                 int64_t row_step, int64_t place_step, __nv_bfloat16* __restrict__ out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) {
    return;
  }
  __nv_bfloat16 parts[3];
  float rest = x[i];
#pragma unroll
  for (int part = 0; part < 3; ++part) {
    parts[part] = __float2bfloat16_rn(rest);
    rest -= __bfloat162float(parts[part]);
  }
  const int64_t row = i / n;
  __nv_bfloat16* target = out + row * row_step + (i - row * n);
#pragma unroll
  for (int place = 0; place < 3; ++place) {
    const int part = places.part[place];
    target[place * place_step] = part == 0 ? parts[0] : part == 1 ? parts[1] : parts[2];
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
      x, count, n, {parts[0], parts[1], parts[2]}, side_by_side ? 3 * n : n,
      side_by_side ? n : count, static_cast<__nv_bfloat16*>(out));
  check_launch("split");
}

}  // namespace anabranch::cuda
