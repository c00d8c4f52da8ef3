#include <algorithm>

#include "kernels/cuda/routing/routing.cuh"

namespace anabranch::cuda {
namespace {

constexpr int64_t kMostBlocks = 256;
constexpr int64_t kElementsOfThread = 16;  // at least

/// Blocks that sum some of the tokens each, in each sequence.
int64_t blocks_for(int64_t tokens, int64_t experts, int64_t sequences) {
  return std::clamp<int64_t>(tokens * (experts + 1) / (kThreads * kElementsOfThread * sequences), 1,
                             std::max<int64_t>(kMostBlocks / sequences, 1));
}

/// The sum of a block's values, in a fixed order; on thread 0.
template <typename value_t>
__device__ value_t block_sum(value_t value) {
  __shared__ value_t sums[kThreads / kWarp];
  value = warp_sum(value);
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = value;
  __syncthreads();
  value_t total = 0;
  for (int warp = 0; warp < kThreads / kWarp; ++warp) {
    total += sums[warp];
  }
  return total;
}

/// A block: partial [experts + 1] of its tokens, one of blockIdx.x's sequence's. As many whole rows of `probabilities` at a time as
/// there are threads for, so that neighbours read neighbours.
template <typename value_t>
__global__ void __launch_bounds__(kThreads)
    partial_sums_kernel(const value_t* __restrict__ probabilities,
                        const value_t* __restrict__ logsumexp, int64_t length, int experts,
                        value_t* __restrict__ partial) {
  __shared__ value_t sums[kThreads];
  const int64_t before = blockIdx.x * length;
  const int64_t begin = before + length * blockIdx.y / gridDim.y;
  const int64_t end = before + length * (blockIdx.y + 1) / gridDim.y;
  partial += (static_cast<int64_t>(blockIdx.x) * gridDim.y + blockIdx.y) * (experts + 1);
  const int thread = threadIdx.x;
  const int rows = max(kThreads / experts, 1);
  const int width = min(experts, kThreads);
  const int row = thread / width;
  for (int first = 0; first < experts; first += width) {
    const int expert = first + thread % width;
    value_t sum = 0;
    if (row < rows && expert < experts) {
#pragma unroll 4
      for (int64_t token = begin + row; token < end; token += rows) {
        sum += probabilities[token * experts + expert];
      }
    }
    sums[thread] = sum;
    __syncthreads();
    if (row == 0 && expert < experts) {
      for (int other = 1; other < rows; ++other) {
        sum += sums[other * width + thread];
      }
      partial[expert] = sum;
    }
    __syncthreads();
  }
  value_t squares = 0;
  for (int64_t token = begin + thread; token < end; token += kThreads) {
    squares += logsumexp[token] * logsumexp[token];
  }
  squares = block_sum(squares);
  if (thread == 0) partial[experts] = squares;
}

/// A warp's lane for each column, the warps of a block for every eighth of the parts. Of blockIdx.x's parts and row
/// [experts] of `probability_sum`; the sum of squares only where it has an address.
template <typename value_t>
__global__ void __launch_bounds__(kThreads)
    sum_partial_kernel(const value_t* __restrict__ partial, int parts, int experts,
                       value_t* __restrict__ probability_sum,
                       value_t* __restrict__ squared_logsumexp_sum) {
  constexpr int kWarps = kThreads / kWarp;
  __shared__ value_t sums[kWarps][kWarp];
  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  const int column = blockIdx.y * kWarp + lane;
  partial += static_cast<int64_t>(blockIdx.x) * parts * (experts + 1);
  value_t sum = 0;
  if (column <= experts) {
#pragma unroll 8
    for (int part = warp; part < parts; part += kWarps) {
      sum += partial[static_cast<int64_t>(part) * (experts + 1) + column];
    }
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp == 0 && column <= experts) {
    for (int other = 1; other < kWarps; ++other) {
      sum += sums[other][lane];
    }
    if (column < experts) {
      probability_sum[static_cast<int64_t>(blockIdx.x) * experts + column] = sum;
    } else if (squared_logsumexp_sum != nullptr) {
      *squared_logsumexp_sum = sum;
    }
  }
}

template <typename value_t>
__global__ void __launch_bounds__(kThreads)
    batch_sums_kernel(const int64_t* __restrict__ counts, int64_t tokens, int experts,
                      const value_t* __restrict__ probability_sum,
                      const value_t* __restrict__ squared_logsumexp_sum, double* __restrict__ out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < experts) {
    out[i] = static_cast<double>(counts[i]);
    out[experts + 1 + i] = static_cast<double>(probability_sum[i]);
  } else if (i == experts) {
    out[experts] = static_cast<double>(tokens);
    out[2 * experts + 1] = static_cast<double>(*squared_logsumexp_sum);
  }
}

/// A batch's sums, in one vector: see RoutingKernels::batch_sums.
struct SumsOfBatch {
  const double* sums;
  const double* chosen_of_expert;
  int experts;

  __device__ double tokens() const { return sums[experts]; }
  __device__ double chosen(int expert) const { return chosen_of_expert[expert]; }
  __device__ int64_t load(int expert) const { return static_cast<int64_t>(sums[expert]); }
  __device__ double probabilities(int expert) const { return sums[experts + 1 + expert]; }
  __device__ double squared_logsumexp() const { return sums[2 * experts + 1]; }
};

/// The same of one rank alone, where they are.
template <typename value_t>
struct SumsOfOne {
  const int64_t* counts;
  const value_t* probability_sum;
  const value_t* squared_logsumexp_sum;
  int64_t num_tokens;

  __device__ double tokens() const { return static_cast<double>(num_tokens); }
  __device__ double chosen(int expert) const { return static_cast<double>(counts[expert]); }
  __device__ int64_t load(int expert) const { return counts[expert]; }
  __device__ double probabilities(int expert) const {
    return static_cast<double>(probability_sum[expert]);
  }
  __device__ double squared_logsumexp() const {
    return static_cast<double>(*squared_logsumexp_sum);
  }
};

/// One block.
template <typename value_t, typename Sums>
__global__ void __launch_bounds__(kThreads)
    batch_losses_kernel(Sums sums, int experts, double scale, Losses losses) {
  const double tokens = fmax(sums.tokens(), 1.0);  // none at all: losses are 0
  double balance = 0;
  for (int expert = threadIdx.x; expert < experts; expert += kThreads) {
    const double slope = sums.chosen(expert) * scale / (tokens * tokens);
    losses.balance_slope[expert] = slope;
    losses.expert_load[expert] = sums.load(expert);
    balance += slope * sums.probabilities(expert);
  }
  balance = block_sum(balance);
  if (threadIdx.x == 0) {
    *static_cast<value_t*>(losses.balance) = static_cast<value_t>(balance);
    *static_cast<value_t*>(losses.z) = static_cast<value_t>(sums.squared_logsumexp() / tokens);
    *losses.z_slope = 1 / tokens;
  }
}

/// A block counts some of a sequence's ids in shared memory, [experts]; what is no expert's id it leaves out.
template <typename value_t>
__global__ void __launch_bounds__(kThreads)
    sequence_counts_kernel(const int64_t* __restrict__ expert_ids, int64_t length, int experts,
                           value_t* __restrict__ counts) {
  extern __shared__ unsigned histogram[];
  clear_histogram(histogram, experts);
  const int64_t* const ids = expert_ids + blockIdx.x * length;
  for (int64_t i = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x; i < length;
       i += static_cast<int64_t>(gridDim.y) * kThreads) {
    if (is_expert(ids[i], experts)) {
      atomicAdd(&histogram[ids[i]], 1u);
    }
  }
  __syncthreads();
  for (int expert = threadIdx.x; expert < experts; expert += kThreads) {
    if (const unsigned more = histogram[expert]; more != 0) {
      atomicAdd(&counts[static_cast<int64_t>(blockIdx.x) * experts + expert],
                static_cast<value_t>(more));
    }
  }
}

template <typename value_t>
void launch(int64_t tokens, int64_t experts, const RoutingSums& sums, cudaStream_t stream) {
  const int64_t sequences = std::max<int64_t>(sums.sequences, 1);
  const int64_t blocks = blocks_for(tokens, experts, sequences);
  // Sequences on x, of which a grid may have more than 65,535.
  const unsigned rows = grid_size(sequences);
  const unsigned columns = grid_size(divide_up(experts + 1, kWarp), kMostGridRows);
  auto* const partial = static_cast<value_t*>(sums.scratch);
  partial_sums_kernel<<<dim3(rows, grid_size(blocks)), kThreads, 0, stream>>>(
      static_cast<const value_t*>(sums.probabilities), static_cast<const value_t*>(sums.logsumexp),
      tokens / sequences, static_cast<int>(experts), partial);
  check_launch("partial_sums");
  sum_partial_kernel<<<dim3(1, columns), kThreads, 0, stream>>>(
      partial, static_cast<int>(blocks * sequences), static_cast<int>(experts),
      static_cast<value_t*>(sums.probability_sum),
      static_cast<value_t*>(sums.squared_logsumexp_sum));
  check_launch("sum_partial");
  if (sums.sequences > 0) {
    sum_partial_kernel<value_t><<<dim3(rows, columns), kThreads, 0, stream>>>(
        partial, static_cast<int>(blocks), static_cast<int>(experts),
        static_cast<value_t*>(sums.sequence_sums), nullptr);
    check_launch("sum_partial of sequences");
  }
}

}  // namespace

int64_t routing_sums_scratch(int64_t tokens, int64_t experts, int64_t sequences) {
  sequences = std::max<int64_t>(sequences, 1);
  return blocks_for(tokens, experts, sequences) * sequences * (experts + 1);
}

void launch_routing_sums(Scalar scalar, int64_t tokens, int64_t experts, const RoutingSums& sums,
                         cudaStream_t stream) {
  dispatch_value(scalar, [&](auto zero) { launch<decltype(zero)>(tokens, experts, sums, stream); });
}

void launch_sequence_counts(Scalar scalar, const int64_t* expert_ids, int64_t sequences,
                            int64_t length, int64_t experts, void* counts, cudaStream_t stream) {
  if (sequences == 0 || length == 0) {
    return;
  }
  dispatch_value(scalar, [&](auto zero) {
    using value_t = decltype(zero);
    const auto kernel = sequence_counts_kernel<value_t>;
    const size_t shared = experts * sizeof(unsigned);
    allow_shared_memory(kernel, shared);
    const int64_t blocks = std::min(divide_up(length, kThreads * kElementsOfThread),
                                    divide_up(kMostBlocks, sequences));
    kernel<<<dim3(grid_size(sequences), grid_size(blocks)), kThreads, shared, stream>>>(
        expert_ids, length, static_cast<int>(experts), static_cast<value_t*>(counts));
    check_launch("sequence_counts");
  });
}

void launch_batch_sums(Scalar scalar, const int64_t* counts, int64_t tokens, int64_t experts,
                       const void* probability_sum, const void* squared_logsumexp_sum, double* out,
                       cudaStream_t stream) {
  const auto launch = [&](auto zero) {
    using value_t = decltype(zero);
    batch_sums_kernel<<<grid_size(divide_up(experts + 1, kThreads)), kThreads, 0, stream>>>(
        counts, tokens, static_cast<int>(experts), static_cast<const value_t*>(probability_sum),
        static_cast<const value_t*>(squared_logsumexp_sum), out);
    check_launch("batch_sums");
  };
  scalar == Scalar::kDouble ? launch(double{}) : launch(float{});
}

void launch_batch_losses(Scalar scalar, const double* sums, const double* chosen, int64_t experts,
                         int64_t top_k, const Losses& losses, cudaStream_t stream) {
  const double scale = static_cast<double>(experts) / static_cast<double>(top_k);
  const int count = static_cast<int>(experts);
  const auto kernel = scalar == Scalar::kDouble ? batch_losses_kernel<double, SumsOfBatch>
                                                : batch_losses_kernel<float, SumsOfBatch>;
  kernel<<<1, kThreads, 0, stream>>>({sums, chosen, count}, count, scale, losses);
  check_launch("batch_losses");
}

void launch_losses_of_one(Scalar scalar, const int64_t* counts, int64_t tokens, int64_t experts,
                          const void* probability_sum, const void* squared_logsumexp_sum,
                          int64_t top_k, const Losses& losses, cudaStream_t stream) {
  const double scale = static_cast<double>(experts) / static_cast<double>(top_k);
  const auto launch = [&](auto zero) {
    using value_t = decltype(zero);
    const SumsOfOne<value_t> sums{counts, static_cast<const value_t*>(probability_sum),
                                  static_cast<const value_t*>(squared_logsumexp_sum), tokens};
    batch_losses_kernel<value_t>
        <<<1, kThreads, 0, stream>>>(sums, static_cast<int>(experts), scale, losses);
    check_launch("losses_of_one");
  };
  scalar == Scalar::kDouble ? launch(double{}) : launch(float{});
}

}  // namespace anabranch::cuda
