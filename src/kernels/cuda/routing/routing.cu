#include "kernels/cuda/routing/best_experts.cuh"

namespace anabranch::cuda {
namespace {

/// A token's logits, as they are or in three parts.
template <typename value_t>
struct LogitsRow {
  const value_t* row;
  int experts;
  bool in_parts;

  __device__ value_t operator[](int expert) const {
    return in_parts ? sum_of_parts(row + expert, experts) : row[expert];
  }
};

/// The `top_k` largest logits in order, ties to the lowest expert. Their probabilities go to
/// `weights`, divided by their sum if wanted. A lane keeps one of as many slots as there are lanes,
/// and completes it together with the others.
template <int kPerLane, typename value_t, int kLanes, typename LogitAt>
__device__ void select(const LogitAt& logit_at, int experts, const Lanes<value_t, kLanes>& lanes,
                       value_t largest, value_t scale, int top_k, bool renormalize,
                       int64_t* expert_ids, value_t* weights, unsigned* histogram) {
  auto best = best_experts<kPerLane>(lanes, experts, logit_at);
  value_t selected_sum = 0;
  for (int base = 0; base < top_k; base += kLanes) {
    const int slots = min(top_k - base, kLanes);
    value_t own_value = 0;
    int own_expert = 0;
    for (int slot = 0; slot < slots; ++slot) {
      const int expert = best.take();
      if (lanes.lane == slot) {
        own_value = best.choice();
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

/// A lane has its share of the logits and of their exponentials in registers, or for more experts than those hold
/// (kPerLane 0) reads and computes them again.
template <typename value_t, int kLanes, int kPerLane>
__device__ void route_token(int64_t token, const LogitsRow<value_t>& row, int experts, int top_k,
                            bool renormalize, const RouteOutput<value_t>& out,
                            unsigned* histogram) {
  const Lanes<value_t, kLanes> lanes;
  const auto for_each_expert = [&](const auto& body) {
    lanes.template for_each_expert<kPerLane>(experts, body);
  };
  constexpr int kHeld = kPerLane > 0 ? kPerLane : 1;
  value_t logits[kHeld] = {};
  value_t exponentials[kHeld];
  const auto logit_at = [&](int expert, int r) { return kPerLane > 0 ? logits[r] : row[expert]; };
  value_t largest = -kInfinity<value_t>;
  bool finite = true;
  for_each_expert([&](int expert, int r) {
    const value_t logit = row[expert];
    logits[r] = logit;
    largest = max(largest, logit);
    finite = finite && isfinite(logit);
  });
  largest = lanes.largest(largest);
  value_t sum = 0;
  for_each_expert([&](int expert, int r) {
    exponentials[r] = exp(logit_at(expert, r) - largest);
    sum += exponentials[r];
  });
  sum = lanes.sum(sum);
  const value_t scale = 1 / sum;
  value_t* const probabilities = out.probabilities + token * experts;
  for_each_expert([&](int expert, int r) {
    const value_t exponential = kPerLane > 0 ? exponentials[r] : exp(logit_at(expert, r) - largest);
    probabilities[expert] = exponential * scale;
  });
  const value_t logsumexp = lanes.all(finite) ? largest + log(sum) : value_t(NAN);
  if (lanes.lane == 0) {
    out.logsumexp[token] = logsumexp;
  }
  if (isfinite(logsumexp)) {
    select<kPerLane>(logit_at, experts, lanes, largest, scale, top_k, renormalize,
                     out.expert_ids + token * top_k, out.weights + token * top_k, histogram);
  } else {
    out.refuse(token, top_k, lanes, histogram);
  }
}

template <typename value_t, int kLanes, int kPerLane>
__global__ void __launch_bounds__(kThreads, kRouteBlocks<value_t, kPerLane>)
    route_kernel(const value_t* __restrict__ logits, int parts, int64_t tokens, int experts,
                 int top_k, bool renormalize, RouteOutput<value_t> out) {
  extern __shared__ unsigned histogram[];  // [experts]
  clear_histogram(histogram, experts);
  constexpr int kTokens = kThreads / kLanes;
  for (int64_t token = static_cast<int64_t>(blockIdx.x) * kTokens + threadIdx.x / kLanes;
       token < tokens; token += static_cast<int64_t>(gridDim.x) * kTokens) {
    const LogitsRow<value_t> row{logits + token * parts * experts, experts, parts > 1};
    route_token<value_t, kLanes, kPerLane>(token, row, experts, top_k, renormalize, out, histogram);
  }
  add_histogram(histogram, experts, out.counts);
}

/// With p the softmax, w the weights and L the loss: dp = dL/dp through the selected weights and the
/// probability sum, then dlogit = p (dp − ⟨p, dp⟩) + 2 · logsumexp · p · dL/d(Σ logsumexp²).
template <typename value_t, int kLanes>
__global__ void __launch_bounds__(kThreads)
    route_backward_kernel(RouteState<value_t> state, int64_t tokens, int experts, int top_k,
                          bool renormalize, value_t scale, LogitGradient gradient) {
  const int64_t token = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kLanes;
  if (token >= tokens) {
    return;
  }
  const Lanes<value_t, kLanes> lanes;
  if (state.padding != nullptr && state.padding[token]) {
    return clear_gradient(experts, lanes, TokenGradient<value_t>(gradient, token, experts));
  }
  state.enter(token, tokens, experts);
  const value_t* p = state.probabilities + token * experts;
  const int64_t* ids = state.expert_ids + token * top_k;
  const value_t* dweights = state.dweights + token * top_k;
  value_t inner = 0;  // w = c·p / s, s = Σ selected p: dp = (c·dw − ⟨dw, w⟩) / s
  value_t sum = 1;
  if (renormalize) {
    value_t selected = 0;
    for (int slot = lanes.lane; slot < top_k; slot += kLanes) {
      inner += dweights[slot] * state.weights[token * top_k + slot];
      selected += is_expert(ids[slot], experts) ? p[ids[slot]] : value_t(0);
    }
    inner = lanes.sum(inner);
    sum = lanes.sum(selected) + static_cast<value_t>(kLeastScoreSum);
  }
  value_t mean = 0;
  for (int expert = lanes.lane; expert < experts; expert += kLanes) {
    mean += p[expert] * state.dprobability(expert);
  }
  for (int slot = lanes.lane; slot < top_k; slot += kLanes) {
    if (is_expert(ids[slot], experts)) {
      mean += p[ids[slot]] * (scale * dweights[slot] - inner) / sum;
    }
  }
  mean = lanes.sum(mean);
  const value_t rest = 2 * state.logsumexp[token] * state.dsquared_logsumexp() - mean;
  const TokenGradient<value_t> target(gradient, token, experts);
  for (int expert = lanes.lane; expert < experts; expert += kLanes) {
    target.store(expert, p[expert] * (state.dprobability(expert) + rest));
  }
  __syncwarp(lanes.mask);  // the selected experts' are written again, by other lanes
  for (int slot = lanes.lane; slot < top_k; slot += kLanes) {
    const int64_t expert = ids[slot];
    if (!is_expert(expert, experts)) {
      continue;
    }
    const value_t dprobability =
        state.dprobability(expert) + (scale * dweights[slot] - inner) / sum;
    target.store(expert, p[expert] * (dprobability + rest));
  }
}

}  // namespace

void launch_route(const RouteArguments& arguments, const void* logits, const RouteResults& results,
                  cudaStream_t stream) {
  if (arguments.tokens == 0) {
    return;
  }
  dispatch_value(arguments.scalar, [&](auto zero) {
    using value_t = decltype(zero);
    dispatch_experts(arguments.experts, [&](auto lanes, auto per_lane) {
      constexpr int kLanes = decltype(lanes)::value;
      constexpr int kPerLane = decltype(per_lane)::value;
      const auto kernel = route_kernel<value_t, kLanes, kPerLane>;
      const RouteGrid grid = route_grid(arguments, kLanes, kRouteBlocks<value_t, kPerLane>, kernel);
      kernel<<<grid.blocks, kThreads, grid.shared, stream>>>(
          static_cast<const value_t*>(logits), static_cast<int>(arguments.logit_parts),
          arguments.tokens, static_cast<int>(arguments.experts), static_cast<int>(arguments.top_k),
          arguments.renormalize, RouteOutput<value_t>(results));
      check_launch("route");
    });
  });
}

void launch_route_backward(const RouteArguments& arguments, const RouteInputs& inputs,
                           const LogitGradient& gradient, cudaStream_t stream) {
  if (arguments.tokens == 0) {
    return;
  }
  dispatch_value(arguments.scalar, [&](auto zero) {
    using value_t = decltype(zero);
    dispatch_lanes(arguments.experts, [&](auto lanes) {
      constexpr int kLanes = decltype(lanes)::value;
      const unsigned blocks = grid_size(divide_up(arguments.tokens, kThreads / kLanes));
      route_backward_kernel<value_t, kLanes><<<blocks, kThreads, 0, stream>>>(
          RouteState<value_t>(inputs), arguments.tokens, static_cast<int>(arguments.experts),
          static_cast<int>(arguments.top_k), arguments.renormalize,
          static_cast<value_t>(arguments.scale), gradient);
      check_launch("route_backward");
    });
  });
}

}  // namespace anabranch::cuda
