#include <algorithm>
#include <bit>
#include <cmath>

#include "kernels/cuda/routing/routing.cuh"
#include "kernels/sinkhorn.h"

// Sinkhorn's scaling, a launch for each round. What one leaves, experts' sums and biases, the next begins with; once nothing
// changes any more the rest return at once. (One launch for all of them would want all its blocks on the GPU at the same
// time, as a communicator's kernels do, and the two could wait for each other.)

namespace anabranch::cuda {
namespace {

/// Sums over tokens, in units: whole numbers, which are the same in whatever order blocks add them.
using Sum = unsigned long long;

template <typename value_t>
struct Columns {
  int experts;
  value_t unit;        // so many are 1
  const Sum* before;   // [E] of the round before; null in the first
  const value_t* old;  // [E] its biases
};

/// By a whole block: `bias` [E] becomes what it is after the round before, and whether that differs from before it is
/// returned.
template <typename value_t>
__device__ bool scale_columns(const Columns<value_t>& columns, value_t* bias) {
  __shared__ Sum of_warps[kWarp];
  if (columns.before == nullptr) {
    for (int expert = threadIdx.x; expert < columns.experts; expert += blockDim.x) {
      bias[expert] = 0;
    }
    __syncthreads();
    return true;
  }
  Sum total = 0;
  for (int expert = threadIdx.x; expert < columns.experts; expert += blockDim.x) {
    total += columns.before[expert];
  }
  total = warp_sum(total);
  if (threadIdx.x % kWarp == 0) {
    of_warps[threadIdx.x / kWarp] = total;
  }
  __syncthreads();
  total = 0;
  for (int warp = 0; warp < static_cast<int>(blockDim.x) / kWarp; ++warp) {
    total += of_warps[warp];
  }
  const value_t mean = static_cast<value_t>(total) / columns.experts;
  const value_t least = static_cast<value_t>(kLeastSinkhornSum) * columns.unit;
  bool even = true;
  for (int expert = threadIdx.x; expert < columns.experts; expert += blockDim.x) {
    const auto sum = static_cast<value_t>(columns.before[expert]);
    even = even && fabs(sum - mean) <= static_cast<value_t>(kSinkhornTolerance) * mean;
    bias[expert] = columns.old[expert] + log(mean / max(sum, least));
  }
  if (__syncthreads_or(!even)) {
    return true;
  }
  for (int expert = threadIdx.x; expert < columns.experts; expert += blockDim.x) {
    bias[expert] = columns.old[expert];
  }
  __syncthreads();
  return false;
}

template <int kPerLane>
constexpr int kSinkhornThreads = kPerLane <= 8 ? 512 : 4096 / kPerLane;
/// Of a multiprocessor.
template <int kPerLane>
constexpr int kSinkhornBlocks = kPerLane <= 4 ? 3 : 2;

/// The softmax of a token's biased logits, its lanes each with a share: in registers, or for more experts than those hold
/// (kPerLane 0) computed again each time.
template <typename value_t, int kLanes, int kPerLane>
class Row {
 public:
  /// `bias` [E], times log₂ e.
  __device__ Row(const value_t* bias, int experts) : bias_(bias), experts_(experts) {
    for_each_expert([&](int expert, int r) { biases_[r] = bias[expert]; });
  }

  /// False where a logit is not finite.
  __device__ bool read(const value_t* logits) {
    logits_ = logits;
    value_t largest = -kInfinity<value_t>;
    value_t sum = 0;  // NaN by each number that is not finite
    for_each_expert([&](int expert, int r) {
      const value_t exponent = fma(logits[expert], kLog2E, bias_at(expert, r));
      largest = max(largest, exponent);
      sum = fma(exponent, value_t{0}, sum);
      values_[r] = exponent;
    });
    largest_ = lanes_.largest(largest);
    for_each_expert([&](int expert, int r) {
      values_[r] = exp2(exponent_at(expert, r) - largest_);
      sum += values_[r];
    });
    sum = lanes_.sum(sum);
    factor_ = 1 / sum;
    return isfinite(sum);
  }

  /// Calls `body(expert, r, probability)` for each expert of this lane, its r-th.
  template <typename Body>
  __device__ __forceinline__ void for_each(const Body& body) const {
    for_each_expert([&](int expert, int r) {
      body(expert, r,
           factor_ * (kPerLane > 0 ? values_[r] : exp2(exponent_at(expert, r) - largest_)));
    });
  }

  template <typename Body>
  __device__ __forceinline__ void for_each_expert(const Body& body) const {
    lanes_.template for_each_expert<kPerLane>(experts_, body);
  }

  static constexpr auto kLog2E = static_cast<value_t>(1.4426950408889634);

 private:
  __device__ __forceinline__ value_t bias_at(int expert, int r) const {
    return kPerLane > 0 ? biases_[r] : bias_[expert];
  }
  __device__ __forceinline__ value_t exponent_at(int expert, int r) const {
    return kPerLane > 0 ? values_[r] : fma(logits_[expert], kLog2E, bias_[expert]);
  }

  const value_t* bias_;
  const value_t* logits_ = nullptr;
  int experts_;
  Lanes<value_t, kLanes> lanes_;
  value_t biases_[kPerLane > 0 ? kPerLane : 1];
  value_t values_[kPerLane > 0 ? kPerLane : 1];  // exponents, then their powers
  value_t largest_;
  value_t factor_;
};

/// `bias` [E] and `sums` [E], which start at 0, of this round.
template <typename value_t, int kLanes, int kPerLane>
__global__ void __launch_bounds__(kSinkhornThreads<kPerLane>, kSinkhornBlocks<kPerLane>)
    sinkhorn_round_kernel(const value_t* __restrict__ logits, const bool* left_out, int64_t tokens,
                          Columns<value_t> columns, value_t* bias, Sum* sums) {
  constexpr int kRowThreads = kSinkhornThreads<kPerLane>;
  constexpr int kTokens = kRowThreads / kLanes;
  extern __shared__ unsigned char shared[];
  auto* const scaled = reinterpret_cast<value_t*>(shared);  // [E]
  const bool differs = scale_columns(columns, scaled);
  using Softmax = Row<value_t, kLanes, kPerLane>;
  for (int expert = threadIdx.x; expert < columns.experts; expert += kRowThreads) {
    if (blockIdx.x == 0) {
      bias[expert] = scaled[expert];
    }
    scaled[expert] *= Softmax::kLog2E;
  }
  if (!differs) {
    return;
  }
  __syncthreads();
  const int row = threadIdx.x / kLanes;
  Softmax softmax(scaled, columns.experts);
  value_t own[kPerLane > 0 ? kPerLane : 1] = {};
  for (int64_t token = static_cast<int64_t>(blockIdx.x) * kTokens + row; token < tokens;
       token += static_cast<int64_t>(gridDim.x) * kTokens) {
    if ((left_out != nullptr && left_out[token]) ||
        !softmax.read(logits + token * columns.experts)) {
      continue;
    }
    softmax.for_each([&](int expert, int r, value_t probability) {
      if constexpr (kPerLane > 0) {
        own[r] += probability;
      } else {
        atomicAdd(&sums[expert], static_cast<Sum>(probability * columns.unit));
      }
    });
  }
  if constexpr (kPerLane > 0) {
    constexpr int kWidth = kLanes * kPerLane;
    __shared__ value_t of_rows[kTokens][kWidth];
    softmax.for_each_expert([&](int expert, int r) { of_rows[row][expert] = own[r]; });
    __syncthreads();
    for (int expert = threadIdx.x; expert < columns.experts; expert += kRowThreads) {
      value_t sum = 0;
#pragma unroll 8
      for (int other = 0; other < kTokens; ++other) {
        sum += of_rows[other][expert];
      }
      atomicAdd(&sums[expert], static_cast<Sum>(sum * columns.unit));
    }
  }
}

/// One block: the biases after the last round, 0 on average.
template <typename value_t>
__global__ void __launch_bounds__(kThreads)
    sinkhorn_end_kernel(Columns<value_t> columns, value_t* bias) {
  __shared__ value_t of_warps[kThreads / kWarp];
  scale_columns(columns, bias);
  value_t sum = 0;
  for (int expert = threadIdx.x; expert < columns.experts; expert += kThreads) {
    sum += bias[expert];
  }
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) {
    of_warps[threadIdx.x / kWarp] = sum;
  }
  __syncthreads();
  sum = 0;
  for (const value_t of_warp : of_warps) {
    sum += of_warp;
  }
  for (int expert = threadIdx.x; expert < columns.experts; expert += kThreads) {
    bias[expert] -= sum / columns.experts;
  }
}

}  // namespace

void launch_sinkhorn_bias(Scalar scalar, const SinkhornArguments& arguments, cudaStream_t stream) {
  const auto experts = static_cast<int>(arguments.experts);
  auto* const sums = reinterpret_cast<Sum*>(arguments.sums);
  // All tokens' together are below 2⁶².
  const double unit = std::ldexp(1.0, 62 - std::bit_width(static_cast<uint64_t>(arguments.tokens)));
  dispatch_value(scalar, [&](auto zero) {
    using value_t = decltype(zero);
    auto* const biases = static_cast<value_t*>(arguments.biases);
    const auto before = [&](int64_t round) {
      const int64_t last = round - 1;
      return Columns<value_t>{experts, static_cast<value_t>(unit),
                              round == 0 ? nullptr : sums + last * experts,
                              round == 0 ? nullptr : biases + last % 2 * experts};
    };
    dispatch_experts(experts, [&](auto lanes, auto per_lane) {
      constexpr int kLanes = decltype(lanes)::value;
      constexpr int kPerLane = decltype(per_lane)::value;
      constexpr int kRowThreads = kSinkhornThreads<kPerLane>;
      const auto kernel = sinkhorn_round_kernel<value_t, kLanes, kPerLane>;
      const size_t shared = experts * sizeof(value_t);
      allow_shared_memory(kernel, shared);
      const unsigned blocks = grid_size(std::min(divide_up(arguments.tokens, kRowThreads / kLanes),
                                                 kSinkhornBlocks<kPerLane> * multiprocessors()));
      for (int64_t round = 0; round < kSinkhornRounds; ++round) {
        kernel<<<blocks, kRowThreads, shared, stream>>>(
            static_cast<const value_t*>(arguments.logits), arguments.left_out, arguments.tokens,
            before(round), biases + round % 2 * experts, sums + round * experts);
        check_launch("sinkhorn_round");
      }
    });
    sinkhorn_end_kernel<<<1, kThreads, 0, stream>>>(before(kSinkhornRounds),
                                                    static_cast<value_t*>(arguments.bias));
    check_launch("sinkhorn_end");
  });
}

}  // namespace anabranch::cuda
