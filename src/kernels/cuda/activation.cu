#include "kernels/cuda/device.cuh"

namespace anabranch::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRowsPerThread = 4;  // of the forward pass: loads in flight

__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ double error_function(double x) { return erf(x); }
__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ float error_function(float x) { return erff(x); }

// One instruction each: to a few units in the last place, what is subnormal becomes zero.
__device__ __forceinline__ float fast_exponential(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * 1.4426950408889634f));
  return result;
}
__device__ __forceinline__ float fast_reciprocal(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

/// 1 / (1 + e^−x). `kFast`: to a few units in the last place of fp32, which 16-bit types round away.
template <bool kFast, typename acc_t>
__device__ __forceinline__ acc_t sigmoid(acc_t x) {
  if constexpr (kFast) {
    return fast_reciprocal(1.0f + fast_exponential(-x));
  } else {
    return acc_t{1} / (acc_t{1} + exponential(-x));
  }
}

/// erfc(z) e^(z²) for z ≥ 0: erfc to 1.5e-7 (Abramowitz & Stegun 7.1.26).
__device__ __forceinline__ float tail_over_density(float z) {
  const float t = fast_reciprocal(1.0f + 0.3275911f * z);
  float sum = 1.061405429f;
  sum = sum * t - 1.453152027f;
  sum = sum * t + 1.421413741f;
  sum = sum * t - 0.284496736f;
  sum = sum * t + 0.254829592f;
  return sum * t;
}

/// An activation and its derivative at x.
template <typename acc_t>
struct Activated {
  acc_t value;
  acc_t slope;
};

template <ActivationKind kKind, bool kFast, typename acc_t>
__device__ __forceinline__ Activated<acc_t> activate_at(acc_t x) {
  if constexpr (kKind == ActivationKind::kGeluTanh) {
    // ½ (1 + tanh u) = sigmoid(2u), u = √(2/π) (x + 0.044715 x³)
    constexpr acc_t kTwiceRoot = static_cast<acc_t>(1.5957691216057307117597842);
    constexpr acc_t kCubic = static_cast<acc_t>(0.044715);
    const acc_t square = x * x;
    const acc_t s = sigmoid<kFast>(kTwiceRoot * x * (1 + kCubic * square));
    return {x * s, s + x * s * (1 - s) * kTwiceRoot * (1 + 3 * kCubic * square)};
  } else if constexpr (kKind == ActivationKind::kGelu) {
    constexpr acc_t kRootHalf = static_cast<acc_t>(0.70710678118654752440084436);
    constexpr acc_t kDensity = static_cast<acc_t>(0.39894228040143267793994606);  // 1 / √(2π)
    if constexpr (kFast) {
      const float density = fast_exponential(-0.5f * x * x);
      const float tail = 0.5f * tail_over_density(fabsf(x) * kRootHalf) * density;
      const float cdf = x < 0 ? tail : 1.0f - tail;
      return {x * cdf, cdf + x * kDensity * density};
    } else {
      const acc_t cdf = acc_t{0.5} * (1 + error_function(x * kRootHalf));
      return {x * cdf, cdf + x * kDensity * exponential(acc_t{-0.5} * x * x)};
    }
  } else if constexpr (kKind == ActivationKind::kRelu) {
    return {x <= 0 ? acc_t{0} : x, x <= 0 ? acc_t{0} : acc_t{1}};  // NaN stays NaN
  } else {
    const acc_t s = sigmoid<kFast>(x);
    return {x * s, s * (1 + x * (1 - s))};
  }
}

template <typename scalar_t>
constexpr bool kIs16Bit = sizeof(scalar_t) == 2;

/// Threads (x, y): x walks over the packs of a row, each y takes kRowsPerThread rows.
template <typename scalar_t, int kSize, ActivationKind kKind, bool kGlu>
__global__ void __launch_bounds__(kThreads)
    activate_kernel(const scalar_t* __restrict__ hidden, int64_t rows, int64_t width,
                    scalar_t* __restrict__ activated) {
  using acc_t = accumulate_t<scalar_t>;
  const int64_t hidden_width = kGlu ? 2 * width : width;
  const int64_t first_row =
      static_cast<int64_t>(blockIdx.x) * blockDim.y * kRowsPerThread + threadIdx.y;
  for (int64_t column = threadIdx.x * kSize; column < width; column += blockDim.x * kSize) {
    Pack<scalar_t, kSize> gate[kRowsPerThread];
    Pack<scalar_t, kSize> up[kRowsPerThread];
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      const int64_t row = first_row + r * blockDim.y;
      if (row < rows) {
        const scalar_t* source = hidden + row * hidden_width + column;
        gate[r] = load_pack<kSize>(source);
        if constexpr (kGlu) {
          up[r] = load_pack<kSize>(source + width);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      const int64_t row = first_row + r * blockDim.y;
      if (row < rows) {
        acc_t x[kSize];
        acc_t factor[kSize];
        unpack(gate[r], x);
        unpack(up[r], factor);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          x[i] = activate_at<kKind, kIs16Bit<scalar_t>>(x[i]).value;
          if constexpr (kGlu) {
            x[i] *= factor[i];
          }
        }
        store_pack(activated + row * width + column, x);
      }
    }
  }
}

/// The sum over the `blockDim.x` threads of each row, in a fixed order; right on thread x = 0.
template <typename acc_t>
__device__ __forceinline__ acc_t row_sum(acc_t value) {
  __shared__ acc_t sums[kThreads / kWarp];
  value = warp_sum(value);
  if (blockDim.x == kWarp) {
    return value;
  }
  const int warps = blockDim.x / kWarp;
  if (threadIdx.x % kWarp == 0) {
    sums[threadIdx.y * warps + threadIdx.x / kWarp] = value;
  }
  __syncthreads();
  acc_t total = 0;
  for (int w = 0; w < warps; ++w) {
    total += sums[threadIdx.y * warps + w];
  }
  return total;
}

/// Threads (x, y): a row per y. `dactivated` and `weighted` may be the same memory.
template <typename scalar_t, int kSize, ActivationKind kKind, bool kGlu>
__global__ void __launch_bounds__(kThreads)
    activate_backward_kernel(const scalar_t* dactivated, const scalar_t* __restrict__ hidden,
                             const accumulate_t<scalar_t>* __restrict__ weights, int64_t rows,
                             int64_t width, scalar_t* __restrict__ dhidden, scalar_t* weighted,
                             accumulate_t<scalar_t>* __restrict__ dweights) {
  using acc_t = accumulate_t<scalar_t>;
  const int64_t hidden_width = kGlu ? 2 * width : width;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const acc_t weight = weights != nullptr && row < rows ? weights[row] : acc_t{1};
  acc_t dot = 0;
  for (int64_t column = threadIdx.x * kSize; row < rows && column < width;
       column += blockDim.x * kSize) {
    const int64_t at = row * width + column;
    const int64_t hidden_at = row * hidden_width + column;
    acc_t gradient[kSize];
    acc_t gate[kSize];
    acc_t up[kSize];
    acc_t dup[kSize];
    unpack(load_pack<kSize>(dactivated + at), gradient);
    unpack(load_pack<kSize>(hidden + hidden_at), gate);
    if constexpr (kGlu) {
      unpack(load_pack<kSize>(hidden + hidden_at + width), up);
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const auto [value, slope] = activate_at<kKind, kIs16Bit<scalar_t>>(gate[i]);
      const acc_t scaled = weight * gradient[i];
      acc_t activated = value;
      acc_t dgate = scaled * slope;
      if constexpr (kGlu) {
        activated *= up[i];
        dgate *= up[i];
        dup[i] = scaled * value;
      }
      dot += gradient[i] * activated;
      gradient[i] = weight * activated;  // from here on what goes to `weighted`
      gate[i] = dgate;                   // and to `dhidden`
    }
    store_pack(weighted + at, gradient);
    store_pack(dhidden + hidden_at, gate);
    if constexpr (kGlu) {
      store_pack(dhidden + hidden_at + width, dup);
    }
  }
  dot = row_sum(dot);
  if (threadIdx.x == 0 && row < rows) {
    dweights[row] = dot;
  }
}

/// Whole warps along a row, up to `most` threads; the rest of the block along rows.
dim3 block_for(int64_t packs, unsigned most) {
  unsigned x = kWarp;
  while (x < most && x < packs) {
    x += kWarp;
  }
  return dim3(x, kThreads / x);
}

/// Calls `body` with activation and GLU as compile-time constants.
template <typename Body>
void dispatch_activation(ActivationKind activation, bool glu, const Body& body) {
  const auto with_kind = [&](auto kind) {
    if (glu) {
      body(kind, std::true_type{});
    } else {
      body(kind, std::false_type{});
    }
  };
  switch (activation) {
    case ActivationKind::kGeluTanh:
      return with_kind(std::integral_constant<ActivationKind, ActivationKind::kGeluTanh>{});
    case ActivationKind::kGelu:
      return with_kind(std::integral_constant<ActivationKind, ActivationKind::kGelu>{});
    case ActivationKind::kRelu:
      return with_kind(std::integral_constant<ActivationKind, ActivationKind::kRelu>{});
    case ActivationKind::kSilu:
      return with_kind(std::integral_constant<ActivationKind, ActivationKind::kSilu>{});
  }
}

}  // namespace

void launch_activate(const ActivationArguments& arguments, const void* hidden, void* activated,
                     cudaStream_t stream) {
  const auto [scalar, activation, glu, rows, width] = arguments;
  if (rows == 0 || width == 0) {
    return;
  }
  dispatch(scalar, [&, rows = rows, width = width, activation = activation, glu = glu](auto zero) {
    using scalar_t = decltype(zero);
    const int64_t row_bytes = width * static_cast<int64_t>(sizeof(scalar_t));
    dispatch_pack<scalar_t>(aligned_rows(row_bytes, hidden, activated), [&](auto pack_size) {
      dispatch_activation(activation, glu, [&](auto kind, auto is_glu) {
        constexpr int kSize = decltype(pack_size)::value;
        const dim3 block = block_for(width / kSize, kThreads);
        activate_kernel<scalar_t, kSize, decltype(kind)::value, decltype(is_glu)::value>
            <<<grid_size(divide_up(rows, block.y * kRowsPerThread)), block, 0, stream>>>(
                static_cast<const scalar_t*>(hidden), rows, width,
                static_cast<scalar_t*>(activated));
        check_launch("activate");
      });
    });
  });
}

void launch_activate_backward(const ActivationArguments& arguments, const void* dactivated,
                              const void* hidden, const void* weights, void* dhidden,
                              void* weighted, void* dweights, cudaStream_t stream) {
  const auto [scalar, activation, glu, rows, width] = arguments;
  if (rows == 0) {
    return;
  }
  dispatch(scalar, [&, rows = rows, width = width, activation = activation, glu = glu](auto zero) {
    using scalar_t = decltype(zero);
    using acc_t = accumulate_t<scalar_t>;
    const int64_t row_bytes = width * static_cast<int64_t>(sizeof(scalar_t));
    const bool aligned = aligned_rows(row_bytes, dactivated, hidden, dhidden, weighted);
    dispatch_pack<scalar_t>(aligned, [&](auto pack_size) {
      dispatch_activation(activation, glu, [&](auto kind, auto is_glu) {
        constexpr int kSize = decltype(pack_size)::value;
        const dim3 block = block_for(width / kSize, kThreads / 2);
        activate_backward_kernel<scalar_t, kSize, decltype(kind)::value, decltype(is_glu)::value>
            <<<grid_size(divide_up(rows, block.y)), block, 0, stream>>>(
                static_cast<const scalar_t*>(dactivated), static_cast<const scalar_t*>(hidden),
                static_cast<const acc_t*>(weights), rows, width, static_cast<scalar_t*>(dhidden),
                static_cast<scalar_t*>(weighted), static_cast<acc_t*>(dweights));
        check_launch("activate_backward");
      });
    });
  });
}

}  // namespace anabranch::cuda
