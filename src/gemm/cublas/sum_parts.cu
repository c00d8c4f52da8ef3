#include "gemm/cublas/sum_parts.h"

#include "kernels/cuda/device.cuh"

namespace anabranch {
namespace {

constexpr int kThreads = 256;

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    sum_parts_kernel(const cuda::accumulate_t<scalar_t>* __restrict__ parts, int64_t count,
                     int64_t size, bool accumulate, scalar_t* __restrict__ out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= size) {
    return;
  }
  cuda::accumulate_t<scalar_t> sum = 0;
#pragma unroll 4
  for (int64_t part = 0; part < count; ++part) {
    sum += parts[part * size + i];
  }
  if (accumulate) {
    sum += static_cast<cuda::accumulate_t<scalar_t>>(out[i]);
  }
  out[i] = static_cast<scalar_t>(sum);
}

}  // namespace

void launch_sum_parts(cuda::Scalar scalar, const void* parts, int64_t count, int64_t size,
                      bool accumulate, void* out, cudaStream_t stream) {
  const unsigned grid = cuda::grid_size(cuda::divide_up(size, kThreads));
  cuda::dispatch(scalar, [&](auto element) {
    using scalar_t = decltype(element);
    sum_parts_kernel<scalar_t>
        <<<grid, kThreads, 0, stream>>>(static_cast<const cuda::accumulate_t<scalar_t>*>(parts),
                                        count, size, accumulate, static_cast<scalar_t*>(out));
  });
  check_launch("sum_parts");
}

}  // namespace anabranch
