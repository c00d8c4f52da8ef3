#include "gemm/tiles/sum_dots.h"

#include "kernels/cuda/device.cuh"
#include "support/cuda/check.h"

namespace anabranch::tiles {
namespace {

/// Eight lanes a row, in a fixed order.
__global__ void __launch_bounds__(256) sum_dots_kernel(const float* __restrict__ dots, int64_t rows,
                                                       int64_t width, float* __restrict__ sums) {
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x) / 8;
  float sum = 0;
  if (row < rows) {
    for (int64_t i = threadIdx.x % 8; i < width; i += 8) {
      sum += dots[row * width + i];
    }
  }
#pragma unroll
  for (int distance = 1; distance < 8; distance *= 2) {
    sum += __shfl_xor_sync(0xFFFFFFFF, sum, distance);
  }
  if (row < rows && threadIdx.x % 8 == 0) {
    sums[row] = sum;
  }
}

}  // namespace

void launch_sum_dots(const float* dots, int64_t rows, int64_t width, float* sums,
                     cudaStream_t stream) {
  constexpr int64_t kRowsOfBlock = 256 / 8;
  sum_dots_kernel<<<cuda::grid_size(cuda::divide_up(rows, kRowsOfBlock)), 256, 0, stream>>>(
      dots, rows, width, sums);
  check_launch("sum_dots");
}

}  // namespace anabranch::tiles
