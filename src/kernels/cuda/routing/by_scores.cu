#include "kernels/cuda/routing/best_experts.cuh"

// Routing by any scores, as kernels/cpu/routing.cpp says: one pass over the logits up to 1024 experts.

namespace anabranch::cuda {
namespace {

template <typename value_t>
struct Rule {
  int experts;
  int top_k;
  bool renormalize;
  value_t scale;
  ScoreKind score;
  const value_t* expert_bias;
  const int64_t* expert_ids;
  int64_t own_choice;
  const bool* padding;
  int groups;
  int top_groups;
  int summed;
  bool by_logits;
};

template <typename value_t>
__device__ value_t sigmoid_of(value_t logit) {
  return 1 / (1 + exp(-logit));
}

/// A score other than the softmax, and its derivative.
template <typename value_t>
__device__ value_t own_score(ScoreKind kind, value_t logit) {
  if (kind == ScoreKind::kSigmoid) {
    return sigmoid_of(logit);
  }
  return logit < static_cast<value_t>(kSmallSoftplusLogit)
             ? exp(logit / 2)
             : sqrt(max(logit, value_t(0)) + log1p(exp(-fabs(logit))));
}
template <typename value_t>
__device__ value_t score_slope(ScoreKind kind, value_t logit, value_t score) {
  if (kind == ScoreKind::kSigmoid) {
    return score * (1 - score);
  }
  return logit < static_cast<value_t>(kSmallSoftplusLogit) ? score / 2
                                                           : sigmoid_of(logit) / (2 * score);
}

/// One token's logits and what experts are chosen by, its lanes each with a share: in registers, or
/// for more experts than those hold (kPerLane 0) read and computed again each time.
template <typename value_t, int kLanes, int kPerLane>
class Token {
 public:
  __device__ Token(const Rule<value_t>& rule, const value_t* row) : rule_(rule), row_(row) {
    if constexpr (kPerLane > 0) {
      for_each_expert([&](int expert, int r) { values_[r] = row_[expert]; });
    }
  }

  /// Writes the probabilities; returns the logsumexp, NaN where a logit or a choice is not finite.
  /// From here on the values are what experts are chosen by.
  __device__ value_t score_all(value_t* probabilities) {
    bool finite = true;
    value_t largest = -kInfinity<value_t>;
    for_each_expert([&](int expert, int r) {
      const value_t logit = logit_of(expert, r);
      largest = max(largest, logit);
      finite = finite && isfinite(logit);
    });
    largest_ = lanes_.largest(largest);
    value_t held[kPerLane > 0 ? kPerLane : 1] = {};  // scores; of softmax, times the sum
    const auto unscaled = [&](value_t logit) {
      return is_softmax() ? exp(logit - largest_) : own_score(rule_.score, logit);
    };
    value_t sum = 0;
    value_t scores = 0;
    for_each_expert([&](int expert, int r) {
      const value_t logit = logit_of(expert, r);
      held[r] = unscaled(logit);
      sum += is_softmax() ? held[r] : exp(logit - largest_);
      scores += held[r];
    });
    sum = lanes_.sum(sum);
    factor_ = 1 / sum;
    const value_t share =
        is_softmax() ? value_t{1} : 1 / (lanes_.sum(scores) + static_cast<value_t>(kLeastScoreSum));
    for_each_expert([&](int expert, int r) {
      const value_t logit = logit_of(expert, r);
      const value_t score =
          (kPerLane > 0 ? held[r] : unscaled(logit)) * (is_softmax() ? factor_ : value_t{1});
      probabilities[expert] = score * share;
      const value_t choice = choice_of(expert, logit, score);
      finite = finite && isfinite(choice);
      if constexpr (kPerLane > 0) {
        values_[r] = choice;
      }
    });
    return lanes_.all(finite) ? largest_ + log(sum) : value_t(NAN);
  }

  /// Leaves the experts of all but the best groups out.
  __device__ void keep_best_groups() {
    const int size = rule_.experts / rule_.groups;
    const value_t own = group_score(size);
    unsigned kept = 0;
    for (int i = 0; i < rule_.top_groups; ++i) {
      Key best = kept >> lanes_.lane & 1 ? key_of(-kInfinity<value_t>) : key_of(own);
      int group = lanes_.lane;
      lanes_.best(best, group);
      kept |= 1u << group;
    }
    kept_groups_ = kept;
    if constexpr (kPerLane > 0) {
      for_each_expert([&](int expert, int r) {
        values_[r] = kept >> (expert / size) & 1 ? values_[r] : -kInfinity<value_t>;
      });
    }
  }

  /// The experts in order, best first, and their weights. A lane keeps one of as many slots as there
  /// are lanes.
  __device__ void select(int64_t* expert_ids, value_t* weights, unsigned* histogram) const {
    const auto choice_of_lane = [this](int expert, int r) { return choice_at(expert, r); };
    auto best = best_experts<kPerLane>(lanes_, rule_.experts, choice_of_lane);
    value_t selected_sum = static_cast<value_t>(kLeastScoreSum);
    for (int base = 0; base < rule_.top_k; base += kLanes) {
      const int slots = min(rule_.top_k - base, kLanes);
      int own_expert = 0;
      for (int slot = 0; slot < slots; ++slot) {
        const int expert = best.take();
        own_expert = lanes_.lane == slot ? expert : own_expert;
      }
      value_t score = 0;
      if (lanes_.lane < slots) {
        score = score_of(row_[own_expert]);
        expert_ids[base + lanes_.lane] = own_expert;
        weights[base + lanes_.lane] = score;
        atomicAdd(&histogram[own_expert], 1u);
      }
      selected_sum += lanes_.sum(score);
    }
    const value_t sum = rule_.renormalize ? selected_sum : value_t{1};
    for (int slot = lanes_.lane; slot < rule_.top_k; slot += kLanes) {
      weights[slot] = weights[slot] / sum * rule_.scale;  // what this lane has written
    }
  }

  /// The weights of experts that are given.
  __device__ void weigh(const int64_t* chosen, int64_t* expert_ids, value_t* weights,
                        unsigned* histogram) const {
    value_t sum = 0;
    for (int slot = lanes_.lane; slot < rule_.top_k; slot += kLanes) {
      const int64_t expert = chosen[slot];
      const bool is_one = is_expert(expert, rule_.experts);
      const value_t score = is_one ? score_of(row_[expert]) : value_t{0};
      if (expert_ids != chosen) expert_ids[slot] = expert;
      weights[slot] = rule_.renormalize ? score : score * rule_.scale;
      sum += score;
      if (is_one) atomicAdd(&histogram[expert], 1u);
    }
    if (!rule_.renormalize) {
      return;
    }
    sum = lanes_.sum(sum) + static_cast<value_t>(kLeastScoreSum);
    for (int slot = lanes_.lane; slot < rule_.top_k; slot += kLanes) {
      weights[slot] = weights[slot] / sum * rule_.scale;  // what this lane has written
    }
  }

  __device__ const Lanes<value_t, kLanes>& lanes() const { return lanes_; }

 private:
  using Key = key_t<value_t>;

  template <typename Body>
  __device__ __forceinline__ void for_each_expert(const Body& body) const {
    lanes_.template for_each_expert<kPerLane>(rule_.experts, body);
  }

  /// The score of the group of this lane's number; −Inf on lanes behind the last group's.
  __device__ value_t group_score(int size) const {
    if constexpr (kPerLane > 0 && kLanes == kWarp) {
      if (kWarp % size == 0) {
        return score_of_neighbours(size);
      }
    }
    value_t own = -kInfinity<value_t>;
    const auto key_at = [this](int expert, int r) { return key_of(choice_at(expert, r)); };
    for (int group = 0; group < rule_.groups; ++group) {
      Key best = ~Key{0};
      int expert = -1;
      value_t score = 0;
      for (int i = 0; i < min(rule_.summed, size); ++i) {
        lanes_.template next<kPerLane>(best, expert, group * size, (group + 1) * size, key_at);
        score += value_of(best);
      }
      own = lanes_.lane == group ? score : own;
    }
    return own;
  }

  /// The same where `size` neighbouring lanes have a group: those of all groups at once.
  __device__ value_t score_of_neighbours(int size) const {
    const int lane = lanes_.lane;
    const unsigned neighbours = (size == kWarp ? kFullMask : (1u << size) - 1)
                                << (lane & ~(size - 1));
    value_t own = -kInfinity<value_t>;
    const int first = lane * size;  // of this lane's group
#pragma unroll
    for (int r = 0; r < kPerLane; ++r) {
      Key key = lane + r * kLanes < rule_.experts ? key_of(values_[r]) : Key{0};
      value_t score = 0;
      for (int i = 0; i < min(rule_.summed, size); ++i) {
        Key best = key;
        for (int offset = size / 2; offset > 0; offset /= 2) {
          best = max(best, __shfl_xor_sync(kFullMask, best, offset));
        }
        score += value_of(best);
        const unsigned equal = __ballot_sync(kFullMask, key == best) & neighbours;
        key = __ffs(equal) - 1 == lane ? Key{0} : key;
      }
      score = __shfl_sync(kFullMask, score, first % kWarp);
      own = lane < rule_.groups && first / kWarp == r ? score : own;
    }
    return own;
  }

  __device__ __forceinline__ value_t logit_of(int expert, int r) const {
    return kPerLane > 0 ? values_[r] : row_[expert];
  }
  __device__ __forceinline__ value_t score_of(value_t logit) const {
    return is_softmax() ? exp(logit - largest_) * factor_ : own_score(rule_.score, logit);
  }
  __device__ __forceinline__ bool is_softmax() const { return rule_.score == ScoreKind::kSoftmax; }
  __device__ __forceinline__ value_t choice_of(int expert, value_t logit, value_t score) const {
    return (rule_.by_logits ? logit : score) +
           (rule_.expert_bias != nullptr ? rule_.expert_bias[expert] : value_t{0});
  }
  /// −Inf outside the groups that were kept.
  __device__ __forceinline__ value_t choice_at(int expert, int r) const {
    if constexpr (kPerLane > 0) {
      return values_[r];
    } else {
      const bool kept =
          rule_.groups == 1 || kept_groups_ >> (expert / (rule_.experts / rule_.groups)) & 1;
      return kept ? choice_of(expert, row_[expert], score_of(row_[expert])) : -kInfinity<value_t>;
    }
  }

  const Rule<value_t>& rule_;
  const value_t* row_;
  Lanes<value_t, kLanes> lanes_;
  value_t values_[kPerLane > 0 ? kPerLane : 1];  // logits, then choices
  value_t largest_;
  value_t factor_;  // 1 / Σ exp(logit − largest)
  unsigned kept_groups_ = ~0u;
};

template <typename value_t, int kLanes, int kPerLane>
__global__ void __launch_bounds__(kThreads, kRouteBlocks<value_t, kPerLane>)
    route_by_scores_kernel(const value_t* __restrict__ logits, int64_t tokens, Rule<value_t> rule,
                           RouteOutput<value_t> out) {
  extern __shared__ unsigned histogram[];  // [experts]
  clear_histogram(histogram, rule.experts);
  constexpr int kTokens = kThreads / kLanes;
  for (int64_t token = static_cast<int64_t>(blockIdx.x) * kTokens + threadIdx.x / kLanes;
       token < tokens; token += static_cast<int64_t>(gridDim.x) * kTokens) {
    if (rule.padding != nullptr && rule.padding[token]) {
      out.skip(token, rule.experts, rule.top_k, Lanes<value_t, kLanes>());
      continue;
    }
    Token<value_t, kLanes, kPerLane> scored(rule, logits + token * rule.experts);
    const value_t logsumexp = scored.score_all(out.probabilities + token * rule.experts);
    if (scored.lanes().lane == 0) {
      out.logsumexp[token] = logsumexp;
    }
    if (!isfinite(logsumexp)) {
      out.refuse(token, rule.top_k, scored.lanes(), histogram);
      continue;
    }
    int64_t* const expert_ids = out.expert_ids + token * rule.top_k;
    value_t* const weights = out.weights + token * rule.top_k;
    if (rule.expert_ids != nullptr && rule.expert_ids[token * rule.top_k] != rule.own_choice) {
      scored.weigh(rule.expert_ids + token * rule.top_k, expert_ids, weights, histogram);
      continue;
    }
    if (rule.groups > 1) {
      scored.keep_best_groups();
    }
    scored.select(expert_ids, weights, histogram);
  }
  add_histogram(histogram, rule.experts, out.counts);
}

/// With s the scores, s' their derivatives, q = s / (Σ s + ε) and ds = dL/ds through the weights:
/// dlogit = s' (ds + (dq − ⟨q, dq⟩) / (Σ s + ε)) + softmax · dL/dlogsumexp. A lane has its share of the scores in
/// registers, or for more experts than those hold (kPerLane 0) computes them again.
template <typename value_t, int kLanes, int kPerLane>
__global__ void __launch_bounds__(kThreads)
    route_backward_of_scores_kernel(RouteState<value_t> state, ScoreKind kind, int64_t tokens,
                                    int experts, int top_k, bool renormalize, value_t scale,
                                    LogitGradient gradient) {
  const int64_t token = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kLanes;
  if (token >= tokens) {
    return;
  }
  const Lanes<value_t, kLanes> lanes;
  if (state.padding != nullptr && state.padding[token]) {
    return clear_gradient(experts, lanes, TokenGradient<value_t>(gradient, token, experts));
  }
  state.enter(token, tokens, experts);
  const value_t* logits = state.probabilities + token * experts;
  const int64_t* ids = state.expert_ids + token * top_k;
  const value_t* dweights = state.dweights + token * top_k;
  value_t inner = 0;  // w = c·s / Σ chosen s: ds = (c·dw − ⟨dw, w⟩) / Σ chosen s
  value_t chosen_sum = 1;
  if (renormalize) {
    value_t chosen = 0;
    for (int slot = lanes.lane; slot < top_k; slot += kLanes) {
      inner += dweights[slot] * state.weights[token * top_k + slot];
      if (is_expert(ids[slot], experts)) chosen += own_score(kind, logits[ids[slot]]);
    }
    inner = lanes.sum(inner);
    chosen_sum = lanes.sum(chosen) + static_cast<value_t>(kLeastScoreSum);
  }
  value_t held[kPerLane > 0 ? kPerLane : 1] = {};
  value_t sum = 0;
  value_t mean = 0;
  lanes.template for_each_expert<kPerLane>(experts, [&](int expert, int r) {
    held[r] = own_score(kind, logits[expert]);
    sum += held[r];
    mean += held[r] * state.dprobability(expert);
  });
  sum = lanes.sum(sum) + static_cast<value_t>(kLeastScoreSum);
  mean = lanes.sum(mean) / sum;
  const value_t logsumexp = state.logsumexp[token];
  const value_t dlogsumexp = 2 * logsumexp * state.dsquared_logsumexp();
  const TokenGradient<value_t> target(gradient, token, experts);
  const auto dlogit = [&](int64_t expert, value_t score, value_t through_weight) {
    const value_t dscore = through_weight + (state.dprobability(expert) - mean) / sum;
    return score_slope(kind, logits[expert], score) * dscore +
           exp(logits[expert] - logsumexp) * dlogsumexp;
  };
  lanes.template for_each_expert<kPerLane>(experts, [&](int expert, int r) {
    const value_t score = kPerLane > 0 ? held[r] : own_score(kind, logits[expert]);
    target.store(expert, dlogit(expert, score, 0));
  });
  __syncwarp(lanes.mask);  // the chosen experts' are written again, by other lanes
  for (int slot = lanes.lane; slot < top_k; slot += kLanes) {
    if (is_expert(ids[slot], experts)) {
      target.store(ids[slot], dlogit(ids[slot], own_score(kind, logits[ids[slot]]),
                                     (scale * dweights[slot] - inner) / chosen_sum));
    }
  }
}

}  // namespace

void launch_route_by_scores(const RouteArguments& arguments, const ChoiceArguments& choice,
                            const void* logits, const RouteResults& results, cudaStream_t stream) {
  if (arguments.tokens == 0) {
    return;
  }
  dispatch_value(arguments.scalar, [&](auto zero) {
    using value_t = decltype(zero);
    const Rule<value_t> rule{static_cast<int>(arguments.experts),
                             static_cast<int>(arguments.top_k),
                             arguments.renormalize,
                             static_cast<value_t>(arguments.scale),
                             choice.score,
                             static_cast<const value_t*>(choice.expert_bias),
                             choice.expert_ids,
                             choice.own_choice,
                             choice.padding,
                             static_cast<int>(choice.groups),
                             static_cast<int>(choice.top_groups),
                             static_cast<int>(choice.summed),
                             choice.by_logits};
    dispatch_experts(arguments.experts, [&](auto lanes, auto per_lane) {
      constexpr int kLanes = decltype(lanes)::value;
      constexpr int kPerLane = decltype(per_lane)::value;
      const auto kernel = route_by_scores_kernel<value_t, kLanes, kPerLane>;
      const RouteGrid grid = route_grid(arguments, kLanes, kRouteBlocks<value_t, kPerLane>, kernel);
      kernel<<<grid.blocks, kThreads, grid.shared, stream>>>(static_cast<const value_t*>(logits),
                                                             arguments.tokens, rule,
                                                             RouteOutput<value_t>(results));
      check_launch("route_by_scores");
    });
  });
}

void launch_route_backward_of_scores(const RouteArguments& arguments, ScoreKind score,
                                     const RouteInputs& inputs, const LogitGradient& gradient,
                                     cudaStream_t stream) {
  if (arguments.tokens == 0) {
    return;
  }
  dispatch_value(arguments.scalar, [&](auto zero) {
    using value_t = decltype(zero);
    dispatch_experts(arguments.experts, [&](auto lanes, auto per_lane) {
      constexpr int kLanes = decltype(lanes)::value;
      const unsigned blocks = grid_size(divide_up(arguments.tokens, kThreads / kLanes));
      route_backward_of_scores_kernel<value_t, kLanes, decltype(per_lane)::value>
          <<<blocks, kThreads, 0, stream>>>(
              RouteState<value_t>(inputs), score, arguments.tokens,
              static_cast<int>(arguments.experts), static_cast<int>(arguments.top_k),
              arguments.renormalize, static_cast<value_t>(arguments.scale), gradient);
      check_launch("route_backward_of_scores");
    });
  });
}

}  // namespace anabranch::cuda
