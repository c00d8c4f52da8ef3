#pragma once

#include "kernels/cuda/routing/gate.cuh"
#include "kernels/cuda/routing/keys.cuh"
#include "kernels/cuda/routing/routing.h"
#include "kernels/score_sum.h"

// A group of 8 or 32 neighbouring lanes takes one token. Lane l holds experts l, l + lanes, ...

namespace anabranch::cuda {

constexpr int kThreads = 256;
/// Blocks of a multiprocessor, all of which run at once: they walk over all tokens, to add counts up in shared memory
/// first.
template <typename value_t, int kPerLane>
constexpr int kRouteBlocks = (kPerLane <= 4   ? 5
                              : kPerLane <= 8 ? 4
                                              : 2) *
                             sizeof(float) / sizeof(value_t);
template <typename value_t>
constexpr value_t kInfinity = std::numeric_limits<value_t>::infinity();
constexpr int kNobody = std::numeric_limits<int>::max();

template <typename value_t, int kLanes>
struct Lanes {
  using Key = key_t<value_t>;

  int lane = threadIdx.x % kLanes;
  /// The lanes of this token: tokens of one warp may go separate ways.
  unsigned mask =
      kLanes == kWarp ? kFullMask : ((1u << kLanes) - 1) << (threadIdx.x % kWarp / kLanes * kLanes);

  __device__ value_t sum(value_t value) const {
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
      value += __shfl_xor_sync(mask, value, offset);
    }
    return value;
  }

  __device__ bool all(bool condition) const { return __all_sync(mask, condition); }

  /// Calls `body(expert, r)` for each of this lane, its r-th, in ascending order: kPerLane at most, or with 0 any number.
  template <int kPerLane, typename Body>
  __device__ __forceinline__ void for_each_expert(int experts, const Body& body) const {
    if constexpr (kPerLane > 0) {
#pragma unroll
      for (int r = 0; r < kPerLane; ++r) {
        if (lane + r * kLanes < experts) {
          body(lane + r * kLanes, r);
        }
      }
    } else {
      for (int expert = lane; expert < experts; expert += kLanes) {
        body(expert, 0);
      }
    }
  }

  /// The largest value of all lanes.
  __device__ value_t largest(value_t value) const {
    if constexpr (kReducesKeys) {
      return value_of(__reduce_max_sync(mask, key_of(value)));
    } else {
#pragma unroll
      for (int offset = kLanes / 2; offset > 0; offset /= 2) {
        value = max(value, __shfl_xor_sync(mask, value, offset));
      }
      return value;
    }
  }

  /// The largest key of all lanes, and the lowest expert that has it.
  __device__ void best(Key& key, int& expert) const {
    if constexpr (kReducesKeys) {
      const Key most = __reduce_max_sync(mask, key);
      expert = __reduce_min_sync(mask, key == most ? expert : kNobody);
      key = most;
    } else {
#pragma unroll
      for (int offset = kLanes / 2; offset > 0; offset /= 2) {
        const Key other = __shfl_xor_sync(mask, key, offset);
        const int other_expert = __shfl_xor_sync(mask, expert, offset);
        if (other > key || (other == key && other_expert < expert)) {
          key = other;
          expert = other_expert;
        }
      }
    }
  }

  /// Of experts begin .. end − 1 the best that comes after (key, expert), by the keys `key_at(expert, r)`.
  template <int kPerLane, typename KeyAt>
  __device__ __forceinline__ void next(Key& key, int& expert, int begin, int end,
                                       const KeyAt& key_at) const {
    Key best_key = 0;
    int best_expert = kNobody;
    for_each_expert<kPerLane>(end, [&](int candidate, int r) {
      const Key own = key_at(candidate, r);
      const bool after = own < key || (own == key && candidate > expert);
      if (after && own > best_key && candidate >= begin) {
        best_key = own;
        best_expert = candidate;
      }
    });
    best(best_key, best_expert);
    key = best_key;
    expert = best_expert;
  }

 private:
  static constexpr bool kReducesKeys = sizeof(Key) == 4 && kLanes == kWarp;  // one instruction's
};

template <typename value_t>
struct RouteOutput {
  explicit RouteOutput(const RouteResults& results)
      : expert_ids(results.expert_ids),
        weights(static_cast<value_t*>(results.weights)),
        probabilities(static_cast<value_t*>(results.probabilities)),
        logsumexp(static_cast<value_t*>(results.logsumexp)),
        counts(reinterpret_cast<unsigned long long*>(results.counts)),
        first_nonfinite_token(
            reinterpret_cast<unsigned long long*>(results.first_nonfinite_token)) {}

  /// Padding: it goes nowhere and counts for nothing.
  template <int kLanes>
  __device__ void skip(int64_t token, int experts, int top_k,
                       const Lanes<value_t, kLanes>& lanes) const {
    for (int slot = lanes.lane; slot < top_k; slot += kLanes) {
      expert_ids[token * top_k + slot] = -1;
      weights[token * top_k + slot] = 0;
    }
    for (int expert = lanes.lane; expert < experts; expert += kLanes) {
      probabilities[token * experts + expert] = 0;
    }
    if (lanes.lane == 0) {
      logsumexp[token] = 0;
    }
  }

  /// A token that is never routed: any distinct experts will do, and what they give is NaN.
  template <int kLanes>
  __device__ void refuse(int64_t token, int top_k, const Lanes<value_t, kLanes>& lanes,
                         unsigned* histogram) const {
    for (int slot = lanes.lane; slot < top_k; slot += kLanes) {
      expert_ids[token * top_k + slot] = slot;
      weights[token * top_k + slot] = value_t(NAN);
      atomicAdd(&histogram[slot], 1u);
    }
    if (lanes.lane == 0) {
      atomicMin(first_nonfinite_token, static_cast<unsigned long long>(token));
    }
  }

  int64_t* expert_ids;
  value_t* weights;
  value_t* probabilities;
  value_t* logsumexp;
  unsigned long long* counts;
  unsigned long long* first_nonfinite_token;  // −1, the largest unsigned number, if there is none
};

// A block counts its assignments in shared memory, [experts].

__device__ inline void clear_histogram(unsigned* histogram, int experts) {
  for (int expert = threadIdx.x; expert < experts; expert += kThreads) {
    histogram[expert] = 0;
  }
  __syncthreads();
}

/// To counts that start at −1, which one of the blocks makes up for.
__device__ inline void add_histogram(const unsigned* histogram, int experts,
                                     unsigned long long* counts) {
  __syncthreads();
  for (int expert = threadIdx.x; expert < experts; expert += kThreads) {
    const unsigned more = histogram[expert] + (blockIdx.x == 0 ? 1 : 0);
    if (more != 0) {
      atomicAdd(&counts[expert], static_cast<unsigned long long>(more));
    }
  }
}

/// Where a token's gradients go.
template <typename value_t>
class TokenGradient {
 public:
  __device__ TokenGradient(const LogitGradient& gradient, int64_t token, int experts)
      : experts_(experts),
        places_{gradient.places[0], gradient.places[1], gradient.places[2], gradient.places[3]} {
    if (gradient.dlogits != nullptr) {
      dlogits_ = static_cast<value_t*>(gradient.dlogits) + token * experts;
    } else {
      split_ = static_cast<__nv_bfloat16*>(gradient.split) + token * 4 * experts;
    }
  }

  __device__ void store(int64_t expert, value_t value) const {
    if (dlogits_ != nullptr) {
      dlogits_[expert] = value;
      return;
    }
    const Bf16Parts parts(static_cast<float>(value));
#pragma unroll
    for (int place = 0; place < 4; ++place) {
      split_[place * experts_ + expert] = parts[places_.part[place]];
    }
  }

 private:
  value_t* dlogits_ = nullptr;
  __nv_bfloat16* split_ = nullptr;
  int experts_;
  Places places_;
};

template <typename value_t>
struct RouteState {
  explicit RouteState(const RouteInputs& inputs)
      : expert_ids(inputs.expert_ids),
        weights(static_cast<const value_t*>(inputs.weights)),
        probabilities(static_cast<const value_t*>(inputs.probabilities)),
        logsumexp(static_cast<const value_t*>(inputs.logsumexp)),
        padding(inputs.padding),
        dweights(static_cast<const value_t*>(inputs.dweights)),
        dprobability_sum(static_cast<const value_t*>(inputs.dprobability_sum)),
        sequence_length(inputs.sequence_length),
        dsquared_logsumexp_sum(static_cast<const value_t*>(inputs.dsquared_logsumexp_sum)) {}

  const int64_t* expert_ids;
  const value_t* weights;
  const value_t* probabilities;
  const value_t* logsumexp;
  const bool* padding;  // null: none
  const value_t* dweights;

  /// From here on the gradients are those of the sequence of `token`, one of `tokens`.
  __device__ void enter(int64_t token, int64_t tokens, int experts) {
    if (dprobability_sum != nullptr && sequence_length < tokens) {
      dprobability_sum += token / sequence_length * experts;
    }
  }
  __device__ value_t dprobability(int64_t expert) const {
    return dprobability_sum != nullptr ? dprobability_sum[expert] : value_t(0);
  }
  __device__ value_t dsquared_logsumexp() const {
    return dsquared_logsumexp_sum != nullptr ? *dsquared_logsumexp_sum : value_t(0);
  }

 private:
  const value_t* dprobability_sum;
  int64_t sequence_length;
  const value_t* dsquared_logsumexp_sum;
};

/// What is no expert's id has no assignment.
__device__ inline bool is_expert(int64_t id, int experts) {
  return static_cast<uint64_t>(id) < static_cast<uint64_t>(experts);
}

/// Zeros for a token that is padding.
template <typename value_t, int kLanes>
__device__ void clear_gradient(int experts, const Lanes<value_t, kLanes>& lanes,
                               const TokenGradient<value_t>& gradient) {
  for (int expert = lanes.lane; expert < experts; expert += kLanes) {
    gradient.store(expert, 0);
  }
}

/// Calls `body(lanes)` with the lanes that take a token.
template <typename Body>
void dispatch_lanes(int64_t experts, const Body& body) {
  if (experts <= 8) {
    body(std::integral_constant<int, 8>{});
  } else {
    body(std::integral_constant<int, 32>{});
  }
}

/// Calls `body(lanes, per_lane)`, per_lane the smallest power of two that holds `experts` in the
/// lanes' registers, or 0 where none does.
template <typename Body>
void dispatch_experts(int64_t experts, const Body& body) {
  dispatch_lanes(experts, [&](auto lanes) {
    constexpr int kLanes = decltype(lanes)::value;
    const auto call = [&]<int kPerLane>() { body(lanes, std::integral_constant<int, kPerLane>{}); };
    if (experts <= kLanes) {
      return call.template operator()<1>();
    }
    if constexpr (kLanes == kWarp) {
      if (experts <= 64) {
        return call.template operator()<2>();
      }
      if (experts <= 128) {
        return call.template operator()<4>();
      }
      if (experts <= 256) {
        return call.template operator()<8>();
      }
      if (experts <= 512) {
        return call.template operator()<16>();
      }
      if (experts <= 1024) {
        return call.template operator()<32>();
      }
      call.template operator()<0>();
    }
  });
}

template <typename Body>
void dispatch_value(Scalar scalar, const Body& body) {
  if (scalar == Scalar::kDouble) {
    body(double{});
  } else {
    body(float{});
  }
}

struct RouteGrid {
  unsigned blocks;
  size_t shared;
};

/// Of so many bytes that a launch names.
template <typename Kernel>
void allow_shared_memory(Kernel kernel, size_t bytes) {
  constexpr size_t kWithoutAsking = 48 << 10;
  if (bytes > kWithoutAsking) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(bytes)),
               "cudaFuncSetAttribute");
  }
}

/// As many blocks as run at once, `most` of a multiprocessor, and the shared memory of their histograms.
template <typename Kernel>
RouteGrid route_grid(const RouteArguments& arguments, int lanes, int64_t most, Kernel kernel) {
  const int64_t blocks =
      std::min(divide_up(arguments.tokens, kThreads / lanes), most * multiprocessors());
  const size_t shared = arguments.experts * sizeof(unsigned);
  allow_shared_memory(kernel, shared);
  return {grid_size(blocks), shared};
}

}  // namespace anabranch::cuda
