#include "kernels/cuda/experts/activation.cuh"
#include "kernels/cuda/experts/activation.h"
#include "kernels/cuda/device.cuh"

namespace anabranch::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRowsPerThread = 4;  // of the forward pass: loads in flight

/// Threads (x, y): x walks over the packs of a row, each y takes kRowsPerThread rows.
template <typename scalar_t, int kSize, ActivationKind kKind, bool kGlu>
__global__ void __launch_bounds__(kThreads)
    activate_kernel(const scalar_t* __restrict__ hidden, int64_t rows, int64_t width,
                    Limits<accumulate_t<scalar_t>> limits, scalar_t* __restrict__ activated) {
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
          x[i] = activate_at<kKind, kIs16Bit<scalar_t>>(limits.gate(x[i])).value;
          if constexpr (kGlu) {
            x[i] *= limits.up(factor[i]);
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

/// Threads (x, y): a row per y. `dactivated` and `weighted` may be the same memory, and so may
/// `hidden` and `dhidden`.
template <typename scalar_t, int kSize, ActivationKind kKind, bool kGlu>
__global__ void __launch_bounds__(kThreads)
    activate_backward_kernel(const scalar_t* dactivated, const scalar_t* hidden,
                             const accumulate_t<scalar_t>* __restrict__ weights, int64_t rows,
                             int64_t width, Limits<accumulate_t<scalar_t>> limits,
                             scalar_t* dhidden, scalar_t* weighted,
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
      const auto [value, slope] = activate_at<kKind, kIs16Bit<scalar_t>>(limits.gate(gate[i]));
      const acc_t scaled = weight * gradient[i];
      acc_t activated = value;
      acc_t dgate = limits.passes_gate(gate[i]) ? scaled * slope : acc_t{0};
      if constexpr (kGlu) {
        const acc_t factor = limits.up(up[i]);
        activated *= factor;
        dgate *= factor;
        dup[i] = limits.passes_up(up[i]) ? scaled * value : acc_t{0};
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
    case ActivationKind::kReluSquared:
      return with_kind(std::integral_constant<ActivationKind, ActivationKind::kReluSquared>{});
    case ActivationKind::kQuickGelu:
      return with_kind(std::integral_constant<ActivationKind, ActivationKind::kQuickGelu>{});
  }
}

}  // namespace

void launch_activate(const ActivationArguments& arguments, const void* hidden, void* activated,
                     cudaStream_t stream) {
  const auto [scalar, activation, glu, rows, width, limit, offset] = arguments;
  if (rows == 0 || width == 0) {
    return;
  }
  dispatch(scalar, [&, rows = rows, width = width, activation = activation, glu = glu,
                    limit = limit, offset = offset](auto zero) {
    using scalar_t = decltype(zero);
    using acc_t = accumulate_t<scalar_t>;
    const Limits<acc_t> limits{static_cast<acc_t>(limit), static_cast<acc_t>(offset)};
    const int64_t row_bytes = width * static_cast<int64_t>(sizeof(scalar_t));
    dispatch_pack<scalar_t>(aligned_rows(row_bytes, hidden, activated), [&](auto pack_size) {
      dispatch_activation(activation, glu, [&](auto kind, auto is_glu) {
        constexpr int kSize = decltype(pack_size)::value;
        const dim3 block = block_for(width / kSize, kThreads);
        activate_kernel<scalar_t, kSize, decltype(kind)::value, decltype(is_glu)::value>
            <<<grid_size(divide_up(rows, block.y * kRowsPerThread)), block, 0, stream>>>(
                static_cast<const scalar_t*>(hidden), rows, width, limits,
                static_cast<scalar_t*>(activated));
        check_launch("activate");
      });
    });
  });
}

void launch_activate_backward(const ActivationArguments& arguments, const void* dactivated,
                              const void* hidden, const void* weights, void* dhidden,
                              void* weighted, void* dweights, cudaStream_t stream) {
  const auto [scalar, activation, glu, rows, width, limit, offset] = arguments;
  if (rows == 0) {
    return;
  }
  dispatch(scalar, [&, rows = rows, width = width, activation = activation, glu = glu,
                    limit = limit, offset = offset](auto zero) {
    using scalar_t = decltype(zero);
    using acc_t = accumulate_t<scalar_t>;
    const Limits<acc_t> limits{static_cast<acc_t>(limit), static_cast<acc_t>(offset)};
    const int64_t row_bytes = width * static_cast<int64_t>(sizeof(scalar_t));
    const bool aligned = aligned_rows(row_bytes, dactivated, hidden, dhidden, weighted);
    dispatch_pack<scalar_t>(aligned, [&](auto pack_size) {
      dispatch_activation(activation, glu, [&](auto kind, auto is_glu) {
        constexpr int kSize = decltype(pack_size)::value;
        const dim3 block = block_for(width / kSize, kThreads / 2);
        activate_backward_kernel<scalar_t, kSize, decltype(kind)::value, decltype(is_glu)::value>
            <<<grid_size(divide_up(rows, block.y)), block, 0, stream>>>(
                static_cast<const scalar_t*>(dactivated), static_cast<const scalar_t*>(hidden),
                static_cast<const acc_t*>(weights), rows, width, limits,
                static_cast<scalar_t*>(dhidden), static_cast<scalar_t*>(weighted),
                static_cast<acc_t*>(dweights));
        check_launch("activate_backward");
      });
    });
  });
}

}  // namespace anabranch::cuda
