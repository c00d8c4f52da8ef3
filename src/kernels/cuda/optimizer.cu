#include "kernels/cuda/optimizer.h"

#include <algorithm>

#include "kernels/cuda/device.cuh"
#include "kernels/stochastic_rounding.h"

namespace anabranch::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
/// Blocks of a grid, at most: enough for every multiprocessor of any GPU, each of several turns.
constexpr int64_t kBlocks = 2048;
constexpr int kWidth = 4;

/// `kSize` neighbours in one access.
template <typename scalar_t, int kSize>
struct alignas(kSize * sizeof(scalar_t)) Group {
  scalar_t at[kSize];
};
template <int kSize, typename scalar_t>
__device__ __forceinline__ Group<scalar_t, kSize> load(const scalar_t* address) {
  return *reinterpret_cast<const Group<scalar_t, kSize>*>(address);
}
template <int kSize, typename scalar_t>
__device__ __forceinline__ void store(scalar_t* address, const Group<scalar_t, kSize>& group) {
  *reinterpret_cast<Group<scalar_t, kSize>*>(address) = group;
}

/// As the state keeps it; `noise` is only looked at where that is less exact.
template <typename state_t, typename value_t>
__device__ __forceinline__ state_t kept(value_t value, uint32_t noise) {
  if constexpr (std::is_same_v<state_t, value_t>) {
    return value;
  } else {
    const auto bits =
        static_cast<unsigned short>(round_stochastically(__float_as_uint(value), noise));
    return __ushort_as_bfloat16(bits);
  }
}

/// What is the same for all elements of a step.
template <typename value_t>
struct StepFactors {
  value_t scale, keep, beta1, rest1, beta2, rest2, root_correction, step_size, epsilon;
};

/// By one thread for its block: fp64 powers are slow.
template <typename value_t>
__device__ StepFactors<value_t> step_factors(const AdamWNumbers& numbers) {
  const auto step = static_cast<double>(*numbers.steps);
  return {static_cast<value_t>(*numbers.scale),
          static_cast<value_t>(1 - numbers.learning_rate * numbers.decay),
          static_cast<value_t>(numbers.beta1),
          static_cast<value_t>(1 - numbers.beta1),
          static_cast<value_t>(numbers.beta2),
          static_cast<value_t>(1 - numbers.beta2),
          static_cast<value_t>(1 / sqrt(1 - pow(numbers.beta2, step))),
          static_cast<value_t>(numbers.learning_rate / (1 - pow(numbers.beta1, step))),
          static_cast<value_t>(numbers.epsilon)};
}

template <typename value_t, typename state_t, typename rounded_t, int kSize>
__global__ void __launch_bounds__(kThreads)
    adamw_kernel(value_t* __restrict__ masters, const value_t* __restrict__ gradients,
                 state_t* __restrict__ means, state_t* __restrict__ squares,
                 rounded_t* __restrict__ rounded, int64_t count, AdamWNumbers numbers) {
  __shared__ StepFactors<value_t> shared;
  if (threadIdx.x == 0) shared = step_factors<value_t>(numbers);
  __syncthreads();
  const auto f = shared;
  if (!isfinite(f.scale)) return;
  const int64_t step = *numbers.steps;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads * kSize;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kSize; i < count;
       i += stride) {
    auto master = load<kSize>(masters + i);
    const auto gradient = load<kSize>(gradients + i);
    auto mean = load<kSize>(means + i);
    auto square = load<kSize>(squares + i);
    Group<rounded_t, kSize> result;
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      uint64_t noise = 0;
      if constexpr (!std::is_same_v<state_t, value_t>) {
        noise = noise_of(numbers.noise_seed, step, numbers.first_noise + i + k);
      }
      const value_t g = gradient.at[k] * f.scale;
      // Which products are fused is said: the compiler's choice differs with kSize, and so would bits between
      // layouts.
      const value_t m = fma(static_cast<value_t>(mean.at[k]), f.beta1, g * f.rest1);
      const value_t v = fma(static_cast<value_t>(square.at[k]), f.beta2, g * g * f.rest2);
      const value_t change = f.step_size * m / fma(sqrt(v), f.root_correction, f.epsilon);
      master.at[k] = fma(master.at[k], f.keep, -change);
      mean.at[k] = kept<state_t>(m, static_cast<uint32_t>(noise));
      square.at[k] = kept<state_t>(v, static_cast<uint32_t>(noise >> 16));
      result.at[k] = static_cast<rounded_t>(master.at[k]);
    }
    store(masters + i, master);
    store(means + i, mean);
    store(squares + i, square);
    if (rounded != nullptr) store(rounded + i, result);
  }
}

template <typename scalar_t, int kSize>
__global__ void __launch_bounds__(kThreads)
    sum_of_squares_kernel(const scalar_t* __restrict__ x, int64_t count,
                          double* __restrict__ partial) {
  __shared__ double sums[kWarps];
  double sum = 0;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads * kSize;
#pragma unroll 4
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kSize; i < count;
       i += stride) {
    const auto group = load<kSize>(x + i);
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      const auto value = static_cast<double>(static_cast<accumulate_t<scalar_t>>(group.at[k]));
      sum += value * value;
    }
  }
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kWarps; ++warp) sum += sums[warp];
    partial[blockIdx.x] = sum;
  }
}

/// Whether groups of kWidth elements of `bytes` bytes reach all of `count` at each pointer.
template <typename... Pointers>
bool in_groups(int64_t count, int64_t bytes, const Pointers*... pointers) {
  return count % kWidth == 0 &&
         ((reinterpret_cast<uintptr_t>(pointers) % (kWidth * bytes) == 0) && ...);
}

int64_t blocks_of(int64_t count, int64_t size) {
  return std::min(kBlocks, divide_up(count, kThreads * size));
}

template <typename value_t, typename state_t, typename rounded_t>
void launch(const AdamWPointers& pointers, int64_t count, const AdamWNumbers& numbers,
            cudaStream_t stream) {
  const bool grouped = in_groups(count, sizeof(value_t), pointers.master, pointers.gradient) &&
                       in_groups(count, sizeof(state_t), pointers.mean, pointers.square) &&
                       in_groups(count, sizeof(rounded_t), pointers.rounded);
  const auto go = [&](auto size) {
    constexpr int kSize = decltype(size)::value;
    adamw_kernel<value_t, state_t, rounded_t, kSize>
        <<<grid_size(blocks_of(count, kSize)), kThreads, 0, stream>>>(
            static_cast<value_t*>(pointers.master), static_cast<const value_t*>(pointers.gradient),
            static_cast<state_t*>(pointers.mean), static_cast<state_t*>(pointers.square),
            static_cast<rounded_t*>(pointers.rounded), count, numbers);
    check_launch("adamw");
  };
  if (grouped) {
    go(std::integral_constant<int, kWidth>{});
  } else {
    go(std::integral_constant<int, 1>{});
  }
}

template <typename value_t, typename state_t>
void launch(Scalar rounded, const AdamWPointers& pointers, int64_t count,
            const AdamWNumbers& numbers, cudaStream_t stream) {
  if (rounded == Scalar::kHalf) {
    launch<value_t, state_t, __half>(pointers, count, numbers, stream);
  } else {
    launch<value_t, state_t, __nv_bfloat16>(pointers, count, numbers, stream);
  }
}

}  // namespace

void launch_adamw(Scalar master_scalar, Scalar state_scalar, Scalar rounded_scalar,
                  const AdamWPointers& pointers, int64_t count, const AdamWNumbers& numbers,
                  cudaStream_t stream) {
  if (count == 0) return;
  if (master_scalar == Scalar::kDouble) {
    launch<double, double>(rounded_scalar, pointers, count, numbers, stream);
  } else if (state_scalar == Scalar::kBFloat16) {
    launch<float, __nv_bfloat16>(rounded_scalar, pointers, count, numbers, stream);
  } else {
    launch<float, float>(rounded_scalar, pointers, count, numbers, stream);
  }
}

int64_t square_partials(int64_t count) { return blocks_of(count, kWidth); }

void launch_sum_of_squares(Scalar scalar, const void* x, int64_t count, double* partial,
                           cudaStream_t stream) {
  if (count == 0) return;
  const unsigned blocks = grid_size(square_partials(count));
  dispatch(scalar, [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto* values = static_cast<const scalar_t*>(x);
    if (in_groups(count, sizeof(scalar_t), values)) {
      sum_of_squares_kernel<scalar_t, kWidth>
          <<<blocks, kThreads, 0, stream>>>(values, count, partial);
    } else {
      sum_of_squares_kernel<scalar_t, 1><<<blocks, kThreads, 0, stream>>>(values, count, partial);
    }
    check_launch("sum_of_squares");
  });
}

}  // namespace anabranch::cuda
