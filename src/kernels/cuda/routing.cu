#include "kernels/cuda/device.cuh"

// A group of 8 or 32 neighbouring lanes takes one token. Lane l holds experts l, l + lanes, ...

namespace anabranch::cuda {
namespace {

constexpr int kThreads = 256;
/// Blocks of a multiprocessor: they walk over all tokens, to add counts up in shared memory first.
constexpr int kRouteBlocks = 8;
template <typename value_t>
constexpr value_t kInfinity = std::numeric_limits<value_t>::infinity();
constexpr int kNobody = std::numeric_limits<int>::max();

template <typename value_t, int kLanes>
struct Lanes {
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

  /// The largest value of all lanes, and the lowest expert that has it.
  __device__ void best(value_t& value, int& expert) const {
    if constexpr (std::is_same_v<value_t, float> && kLanes == kWarp) {
      // Unsigned numbers in the order of the floats, for which there is one instruction.
      const unsigned bits = __float_as_uint(value + 0.0f);  // −0 is 0
      const unsigned key = bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
      const unsigned most = __reduce_max_sync(mask, key);
      expert = __reduce_min_sync(mask, key == most ? expert : kNobody);
      value = __uint_as_float(most ^ (most >> 31 ? 0x80000000u : 0xffffffffu));
    } else {
#pragma unroll
      for (int offset = kLanes / 2; offset > 0; offset /= 2) {
        const value_t other = __shfl_xor_sync(mask, value, offset);
        const int other_expert = __shfl_xor_sync(mask, expert, offset);
        if (other > value || (other == value && other_expert < expert)) {
          value = other;
          expert = other_expert;
        }
      }
    }
  }
};

/// One lane's share of a token's logits, and which of them are left to choose from: in registers.
template <typename value_t, int kLanes, int kPerLane>
struct Logits {
  value_t values[kPerLane];
  int experts;
  int lane;

  __device__ Logits(const value_t* row, int num_experts, int own_lane)
      : experts(num_experts), lane(own_lane) {
#pragma unroll
    for (int r = 0; r < kPerLane; ++r) {
      values[r] = lane + r * kLanes < experts ? row[lane + r * kLanes] : -kInfinity<value_t>;
    }
  }

  /// Calls `body(expert, value, r)` for each of this lane, its r-th, that is left, in ascending
  /// order.
  template <typename Body>
  __device__ __forceinline__ void for_each(const Body& body) const {
#pragma unroll
    for (int r = 0; r < kPerLane; ++r) {
      if (lane + r * kLanes < experts) {
        body(lane + r * kLanes, values[r], r);
      }
    }
  }

  /// Leaves `expert` out from here on; each is the best of those left.
  __device__ __forceinline__ void take(int expert, value_t) {
#pragma unroll
    for (int r = 0; r < kPerLane; ++r) {
      values[r] = lane + r * kLanes == expert ? -kInfinity<value_t> : values[r];
    }
  }
};

/// The same for more experts than registers: read again each time.
template <typename value_t, int kLanes>
struct Logits<value_t, kLanes, 0> {
  const value_t* row;
  int experts;
  int lane;
  value_t last = kInfinity<value_t>;  // what is left comes after the last that was taken
  int last_expert = -1;

  __device__ Logits(const value_t* values, int num_experts, int own_lane)
      : row(values), experts(num_experts), lane(own_lane) {}

  template <typename Body>
  __device__ __forceinline__ void for_each(const Body& body) const {
    for (int expert = lane; expert < experts; expert += kLanes) {
      const value_t value = row[expert];
      if (last_expert < 0 || value < last || (value == last && expert > last_expert)) {
        body(expert, value, 0);
      }
    }
  }

  __device__ __forceinline__ void take(int expert, value_t value) {
    last = value;
    last_expert = expert;
  }
};

template <typename value_t>
struct RouteOutput {
  int64_t* expert_ids;
  value_t* weights;
  value_t* probabilities;
  value_t* logsumexp;
  unsigned long long* counts;
  unsigned long long* first_nonfinite_token;  // −1, the largest unsigned number, if there is none
};

/// The `top_k` largest logits in order, ties to the lowest expert. Their probabilities go to
/// `weights`, divided by their sum if wanted. A lane keeps one of as many slots as there are lanes,
/// and completes it together with the others.
template <typename value_t, int kLanes, int kPerLane>
__device__ void select(Logits<value_t, kLanes, kPerLane>& logits,
                       const Lanes<value_t, kLanes>& lanes, value_t largest, value_t scale,
                       int top_k, bool renormalize, int64_t* expert_ids, value_t* weights,
                       unsigned* histogram) {
  value_t selected_sum = 0;
  for (int base = 0; base < top_k; base += kLanes) {
    const int slots = min(top_k - base, kLanes);
    value_t own_value = 0;
    int own_expert = 0;
    for (int slot = 0; slot < slots; ++slot) {
      value_t value = -kInfinity<value_t>;
      int expert = kNobody;
      logits.for_each([&](int candidate, value_t logit, int) {
        if (logit > value) {
          value = logit;
          expert = candidate;
        }
      });
      lanes.best(value, expert);
      logits.take(expert, value);
      if (lanes.lane == slot) {
        own_value = value;
        own_expert = expert;
      }
    }
    value_t probability = 0;
    if (lanes.lane < slots) {
      probability = exp(own_value - largest) * scale;
      expert_ids[base + lanes.lane] = own_expert;
      weights[base + lanes.lane] = probability;
      atomicAdd(&histogram[own_expert], 1u);
    }
    selected_sum += lanes.sum(probability);
  }
  for (int slot = lanes.lane; renormalize && slot < top_k; slot += kLanes) {
    weights[slot] /= selected_sum;  // what this lane has written
  }
}

template <typename value_t, int kLanes, int kPerLane>
__device__ void route_token(int64_t token, const value_t* logits_row, int experts, int top_k,
                            bool renormalize, const RouteOutput<value_t>& out,
                            unsigned* histogram) {
  const Lanes<value_t, kLanes> lanes;
  Logits<value_t, kLanes, kPerLane> logits(logits_row, experts, lanes.lane);
  value_t largest = -kInfinity<value_t>;
  bool finite = true;
  logits.for_each([&](int, value_t logit, int) {
    largest = max(largest, logit);
    finite = finite && isfinite(logit);
  });
  int nobody = kNobody;
  lanes.best(largest, nobody);
  value_t sum = 0;
  value_t exponentials[kPerLane == 0 ? 1 : kPerLane];
  logits.for_each([&](int, value_t logit, int r) {
    const value_t exponential = exp(logit - largest);
    sum += exponential;
    if constexpr (kPerLane > 0) {
      exponentials[r] = exponential;
    }
  });
  sum = lanes.sum(sum);
  const value_t scale = 1 / sum;
  logits.for_each([&](int expert, value_t logit, int r) {
    value_t exponential;
    if constexpr (kPerLane > 0) {
      exponential = exponentials[r];
    } else {
      exponential = exp(logit - largest);
    }
    out.probabilities[token * experts + expert] = exponential * scale;
  });
  const value_t logsumexp = lanes.all(finite) ? largest + log(sum) : value_t(NAN);
  if (lanes.lane == 0) {
    out.logsumexp[token] = logsumexp;
  }
  int64_t* expert_ids = out.expert_ids + token * top_k;
  value_t* weights = out.weights + token * top_k;
  if (isfinite(logsumexp)) {
    select(logits, lanes, largest, scale, top_k, renormalize, expert_ids, weights, histogram);
    return;
  }
  // Never routed: any distinct experts will do.
  for (int slot = lanes.lane; slot < top_k; slot += kLanes) {
    expert_ids[slot] = slot;
    weights[slot] = 0;
    atomicAdd(&histogram[slot], 1u);
  }
  if (lanes.lane == 0) {
    atomicMin(out.first_nonfinite_token, static_cast<unsigned long long>(token));
  }
}

template <typename value_t, int kLanes, int kPerLane>
__global__ void __launch_bounds__(kThreads)
    route_kernel(const value_t* __restrict__ logits, int64_t tokens, int experts, int top_k,
                 bool renormalize, RouteOutput<value_t> out) {
  extern __shared__ unsigned histogram[];  // [experts]
  for (int expert = threadIdx.x; expert < experts; expert += kThreads) {
    histogram[expert] = 0;
  }
  __syncthreads();
  constexpr int kTokens = kThreads / kLanes;
  for (int64_t token = static_cast<int64_t>(blockIdx.x) * kTokens + threadIdx.x / kLanes;
       token < tokens; token += static_cast<int64_t>(gridDim.x) * kTokens) {
    route_token<value_t, kLanes, kPerLane>(token, logits + token * experts, experts, top_k,
                                           renormalize, out, histogram);
  }
  __syncthreads();
  for (int expert = threadIdx.x; expert < experts; expert += kThreads) {
    if (histogram[expert] != 0) {
      atomicAdd(&out.counts[expert], static_cast<unsigned long long>(histogram[expert]));
    }
  }
}

template <typename value_t>
struct RouteState {
  const int64_t* expert_ids;
  const value_t* weights;
  const value_t* probabilities;
  const value_t* logsumexp;
  const value_t* dweights;
  const value_t* dprobability_sum;
  const value_t* dsquared_logsumexp_sum;
};

/// With p the softmax, w the weights and L the loss: dp = dL/dp through the selected weights and the
/// probability sum, then dlogit = p (dp − ⟨p, dp⟩) + 2 · logsumexp · p · dL/d(Σ logsumexp²).
template <typename value_t, int kLanes>
__global__ void __launch_bounds__(kThreads)
    route_backward_kernel(RouteState<value_t> state, int64_t tokens, int experts, int top_k,
                          bool renormalize, value_t* __restrict__ dlogits) {
  const int64_t token = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kLanes;
  if (token >= tokens) {
    return;
  }
  const Lanes<value_t, kLanes> lanes;
  const value_t* p = state.probabilities + token * experts;
  const int64_t* ids = state.expert_ids + token * top_k;
  const value_t* dweights = state.dweights + token * top_k;
  value_t inner = 0;  // w = p / s, s = Σ selected p: dp = (dw − ⟨dw, w⟩) / s
  value_t sum = 1;
  if (renormalize) {
    value_t selected = 0;
    for (int slot = lanes.lane; slot < top_k; slot += kLanes) {
      inner += dweights[slot] * state.weights[token * top_k + slot];
      selected += p[ids[slot]];
    }
    inner = lanes.sum(inner);
    sum = lanes.sum(selected);
  }
  value_t mean = 0;
  for (int expert = lanes.lane; expert < experts; expert += kLanes) {
    mean += p[expert] * state.dprobability_sum[expert];
  }
  for (int slot = lanes.lane; slot < top_k; slot += kLanes) {
    mean += p[ids[slot]] * (dweights[slot] - inner) / sum;
  }
  mean = lanes.sum(mean);
  const value_t rest = 2 * state.logsumexp[token] * *state.dsquared_logsumexp_sum - mean;
  value_t* target = dlogits + token * experts;
  for (int expert = lanes.lane; expert < experts; expert += kLanes) {
    target[expert] = p[expert] * (state.dprobability_sum[expert] + rest);
  }
  __syncwarp(lanes.mask);  // the selected experts' are written again, by other lanes
  for (int slot = lanes.lane; slot < top_k; slot += kLanes) {
    const int64_t expert = ids[slot];
    const value_t dprobability = state.dprobability_sum[expert] + (dweights[slot] - inner) / sum;
    target[expert] = p[expert] * (dprobability + rest);
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

}  // namespace

void launch_route(const RouteArguments& arguments, const void* logits, int64_t* expert_ids,
                  void* weights, void* probabilities, void* logsumexp, int64_t* counts,
                  int64_t* first_nonfinite_token, cudaStream_t stream) {
  if (arguments.tokens == 0) {
    return;
  }
  dispatch_value(arguments.scalar, [&](auto zero) {
    using value_t = decltype(zero);
    dispatch_experts(arguments.experts, [&](auto lanes, auto per_lane) {
      constexpr int kLanes = decltype(lanes)::value;
      const auto kernel = route_kernel<value_t, kLanes, decltype(per_lane)::value>;
      const RouteOutput<value_t> out{expert_ids,
                                     static_cast<value_t*>(weights),
                                     static_cast<value_t*>(probabilities),
                                     static_cast<value_t*>(logsumexp),
                                     reinterpret_cast<unsigned long long*>(counts),
                                     reinterpret_cast<unsigned long long*>(first_nonfinite_token)};
      const int64_t blocks = std::min(divide_up(arguments.tokens, kThreads / kLanes),
                                      kRouteBlocks * multiprocessors());
      const size_t shared = arguments.experts * sizeof(unsigned);
      check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(shared)),
                 "cudaFuncSetAttribute");
      kernel<<<grid_size(blocks), kThreads, shared, stream>>>(
          static_cast<const value_t*>(logits), arguments.tokens,
          static_cast<int>(arguments.experts), static_cast<int>(arguments.top_k),
          arguments.renormalize, out);
      check_launch("route");
    });
  });
}

void launch_route_backward(const RouteArguments& arguments, const int64_t* expert_ids,
                           const void* weights, const void* probabilities, const void* logsumexp,
                           const RouteGradients& gradients, void* dlogits, cudaStream_t stream) {
  if (arguments.tokens == 0) {
    return;
  }
  dispatch_value(arguments.scalar, [&](auto zero) {
    using value_t = decltype(zero);
    dispatch_lanes(arguments.experts, [&](auto lanes) {
      constexpr int kLanes = decltype(lanes)::value;
      const RouteState<value_t> state{
          expert_ids,
          static_cast<const value_t*>(weights),
          static_cast<const value_t*>(probabilities),
          static_cast<const value_t*>(logsumexp),
          static_cast<const value_t*>(gradients.dweights),
          static_cast<const value_t*>(gradients.dprobability_sum),
          static_cast<const value_t*>(gradients.dsquared_logsumexp_sum)};
      const unsigned blocks = grid_size(divide_up(arguments.tokens, kThreads / kLanes));
      route_backward_kernel<value_t, kLanes><<<blocks, kThreads, 0, stream>>>(
          state, arguments.tokens, static_cast<int>(arguments.experts),
          static_cast<int>(arguments.top_k), arguments.renormalize, static_cast<value_t*>(dlogits));
      check_launch("route_backward");
    });
  });
}

}  // namespace anabranch::cuda
