#include "kernels/cuda/routing/best_experts.cuh"

// What balances by order statistics: experts that choose tokens, and the histograms of biases that would have balanced.

namespace anabranch::cuda {
namespace {

/// Σ over the threads of a block, which all of them get. Three totals take turns, so that one is cleared while nobody
/// adds to it or reads it.
class BlockSum {
 public:
  /// `totals` [3] in shared memory.
  __device__ explicit BlockSum(int* totals) : totals_(totals) {
    if (threadIdx.x < 3) {
      totals_[threadIdx.x] = 0;
    }
    __syncthreads();
  }

  __device__ int operator()(int own) {
    own = __reduce_add_sync(kFullMask, own);
    if (threadIdx.x % kWarp == 0) {
      atomicAdd(&totals_[turn_], own);
    }
    __syncthreads();
    const int total = totals_[turn_];
    turn_ = (turn_ + 1) % 3;
    if (threadIdx.x == 0) {
      totals_[(turn_ + 1) % 3] = 0;
    }
    return total;
  }

 private:
  int* totals_;
  int turn_ = 0;
};

/// The scores of one expert for a sequence's tokens, as keys; of padding 0. kHeld of them are in a thread's registers,
/// or with 0 they are read each time.
template <typename value_t, int kHeld>
class Column {
 public:
  __device__ Column(const value_t* scores, const bool* padding, int length)
      : scores_(scores), padding_(padding), length_(length) {
    if constexpr (kHeld > 0) {
#pragma unroll
      for (int r = 0; r < kHeld; ++r) {
        held_[r] = read(threadIdx.x + r * blockDim.x);
      }
    }
  }

  /// How many of this thread's tokens there are for which `is_one(key, token)`.
  template <typename Condition>
  __device__ __forceinline__ int count(const Condition& is_one) const {
    int found = 0;
    if constexpr (kHeld > 0) {
#pragma unroll
      for (int r = 0; r < kHeld; ++r) {
        found += is_one(held_[r], static_cast<int>(threadIdx.x + r * blockDim.x));
      }
    } else {
      for (int token = threadIdx.x; token < length_; token += blockDim.x) {
        found += is_one(read(token), token);
      }
    }
    return found;
  }

 private:
  /// 0 behind the last token.
  __device__ __forceinline__ key_t<value_t> read(int token) const {
    return token < length_ && !(padding_ != nullptr && padding_[token]) ? key_of(scores_[token])
                                                                        : 0;
  }

  const value_t* scores_;
  const bool* padding_;
  int length_;
  key_t<value_t> held_[kHeld > 0 ? kHeld : 1];
};

/// A block for each sequence and expert: a key that as many have reached as it takes, found bit by bit from the highest; or
/// where equal ones straddle that number the least key that it takes, and the last token with it.
template <typename value_t, int kHeld>
__global__ void __launch_bounds__(1024)
    token_thresholds_kernel(const value_t* __restrict__ columns, const bool* padding,
                            int64_t tokens, int length, int64_t top_k, TokenThreshold* thresholds) {
  __shared__ int totals[3];
  BlockSum sum(totals);
  using Key = key_t<value_t>;
  const int experts = static_cast<int>(gridDim.y);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * length;
  const Column<value_t, kHeld> column(columns + blockIdx.y * tokens + first,
                                      padding != nullptr ? padding + first : nullptr, length);
  const int64_t candidates = sum(column.count([](Key key, int) { return key != 0; }));
  const int64_t taken = min(candidates, (candidates * top_k + experts - 1) / experts);
  Key least = taken == 0 ? ~Key{0} : Key{0};
  int last = 0;
  if (taken > 0) {
    bool exact = false;
    for (Key bit = Key{1} << (8 * sizeof(Key) - 1); bit != 0 && !exact; bit >>= 1) {
      const Key next = least | bit;
      const int reached = sum(column.count([=](Key key, int) { return key >= next; }));
      least = reached >= taken ? next : least;
      exact = reached == taken;
    }
    if (exact) {  // all above the key below
      --least;
      last = -1;
    } else {  // the largest number with fewer than wanted before it
      const int above = sum(column.count([=](Key key, int) { return key > least; }));
      const int wanted = static_cast<int>(taken) - above;  // of the equal ones, 1 at least
      for (int bit = 1 << (31 - __clz(length)); bit != 0; bit >>= 1) {
        const int next = last | bit;
        if (sum(column.count([=](Key key, int token) { return key == least && token < next; })) <
            wanted) {
          last = next;
        }
      }
    }
  }
  if (threadIdx.x == 0) {
    thresholds[static_cast<int64_t>(blockIdx.x) * experts + blockIdx.y] = {least, last};
  }
}

/// A token's scores, found by a warp together: the softmax of its logits, or these.
template <typename value_t>
class Scores {
 public:
  __device__ Scores(const value_t* logits, int experts, bool softmax)
      : logits_(logits), softmax_(softmax) {
    if (!softmax) {
      return;
    }
    const int lane = threadIdx.x % kWarp;
    for (int expert = lane; expert < experts; expert += kWarp) {
      largest_ = max(largest_, logits[expert]);
    }
    largest_ = Lanes<value_t, kWarp>().largest(largest_);
    value_t sum = 0;
    for (int expert = lane; expert < experts; expert += kWarp) {
      sum += exp(logits[expert] - largest_);
    }
    factor_ = 1 / warp_sum(sum);
  }

  __device__ value_t operator[](int expert) const {
    return softmax_ ? exp(logits_[expert] - largest_) * factor_ : logits_[expert];
  }

 private:
  const value_t* logits_;
  bool softmax_;
  value_t largest_ = -kInfinity<value_t>;
  value_t factor_ = 0;
};

/// A block for each 32 tokens, a warp for each of them: their scores, [E, T].
template <typename value_t>
__global__ void __launch_bounds__(kWarp* kWarp)
    score_columns_kernel(const value_t* __restrict__ logits, int64_t tokens, int experts,
                         bool softmax, value_t* __restrict__ columns) {
  __shared__ value_t tile[kWarp][kWarp + 1];  // of tokens and experts
  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kWarp;
  const int64_t own = min(first + warp, tokens - 1);  // beyond the last: the last again
  const Scores<value_t> scores(logits + own * experts, experts, softmax);
  for (int base = 0; base < experts; base += kWarp) {
    if (base + lane < experts) {
      tile[warp][lane] = scores[base + lane];
    }
    __syncthreads();
    if (base + warp < experts && first + lane < tokens) {
      columns[(base + warp) * tokens + first + lane] = tile[lane][warp];
    }
    __syncthreads();
  }
}

/// A warp for each token.
template <typename value_t>
__global__ void __launch_bounds__(kThreads)
    chosen_experts_kernel(const value_t* __restrict__ logits, const bool* padding, int64_t tokens,
                          int64_t length, int experts, bool softmax,
                          const TokenThreshold* __restrict__ thresholds, int64_t* expert_ids) {
  const int64_t token = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
  if (token >= tokens) {
    return;
  }
  const bool kept = padding == nullptr || !padding[token];
  const int64_t sequence = token / length;
  const auto place = static_cast<int>(token - sequence * length);
  const Scores<value_t> scores(logits + token * experts, experts, softmax);
  for (int expert = threadIdx.x % kWarp; expert < experts; expert += kWarp) {
    const TokenThreshold threshold = thresholds[sequence * experts + expert];
    const unsigned long long key = key_of(scores[expert]);
    const bool taken =
        kept && (key > threshold.key || (key == threshold.key && place <= threshold.last));
    expert_ids[token * experts + expert] = taken ? expert : -1;
  }
}

/// A few lanes for each token: its (top_k + 1)-th best choice, which an expert has to reach; NaN of a token that does not
/// count.
template <typename value_t, int kLanes, int kPerLane>
__global__ void __launch_bounds__(kThreads)
    choice_cutoffs_kernel(const value_t* __restrict__ scores, const value_t* __restrict__ bias,
                          const bool* padding, int64_t tokens, int experts, int top_k,
                          value_t* __restrict__ cutoffs) {
  const int64_t token = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kLanes;
  if (token >= tokens) {
    return;
  }
  const Lanes<value_t, kLanes> lanes;
  const value_t* row = scores + token * experts;
  const auto choice_at = [&](int expert, int) { return row[expert] + bias[expert]; };
  bool finite = padding == nullptr || !padding[token];
  lanes.template for_each_expert<kPerLane>(
      experts, [&](int expert, int r) { finite = finite && isfinite(choice_at(expert, r)); });
  value_t cutoff = NAN;
  if (lanes.all(finite)) {
    auto best = best_experts<kPerLane>(lanes, experts, choice_at);
    for (int i = 0; i <= top_k; ++i) {
      best.take();
    }
    cutoff = best.choice();
  }
  if (lanes.lane == 0) {
    cutoffs[token] = cutoff;
  }
}

/// Experts of a block: neighbours, of which a token's scores come in one access.
constexpr int kBinnedExperts = 8;

template <typename value_t>
struct BiasBins {
  const value_t* least_bias;
  const value_t* largest_bias;
  int count;
  unsigned long long* histogram;  // [E, count]
};

/// A block for some of the tokens and experts: what the biases would have had to be, counted in shared memory first.
template <typename value_t>
__global__ void __launch_bounds__(kThreads)
    bias_histogram_kernel(const value_t* __restrict__ scores, const value_t* __restrict__ cutoffs,
                          int64_t tokens, int experts, BiasBins<value_t> bins) {
  extern __shared__ unsigned histogram[];  // [kBinnedExperts, bins.count]
  clear_histogram(histogram, kBinnedExperts * bins.count);
  constexpr int kTokens = kThreads / kBinnedExperts;
  const int first = static_cast<int>(blockIdx.y) * kBinnedExperts;
  const int own = threadIdx.x % kBinnedExperts;
  const value_t least = *bins.least_bias - 1;
  const value_t scale = bins.count / (*bins.largest_bias + 1 - least);
  for (int64_t token = static_cast<int64_t>(blockIdx.x) * kTokens + threadIdx.x / kBinnedExperts;
       token < tokens && first + own < experts;
       token += static_cast<int64_t>(gridDim.x) * kTokens) {
    const value_t cutoff = cutoffs[token];
    if (isnan(cutoff)) {
      continue;
    }
    const auto bin =
        static_cast<int>((cutoff - scores[token * experts + first + own] - least) * scale);
    atomicAdd(&histogram[own * bins.count + max(0, min(bin, bins.count - 1))], 1u);
  }
  __syncthreads();
  const int counted = min(kBinnedExperts, experts - first) * bins.count;
  for (int place = threadIdx.x; place < counted; place += kThreads) {
    if (const unsigned more = histogram[place]; more != 0) {
      atomicAdd(&bins.histogram[static_cast<int64_t>(first) * bins.count + place],
                static_cast<unsigned long long>(more));
    }
  }
}

template <typename value_t>
void launch_token_thresholds(const TokenChoice& choice, cudaStream_t stream) {
  const dim3 grid(grid_size(choice.tokens / choice.length), grid_size(choice.experts));
  const auto length = static_cast<int>(choice.length);
  const auto launch = [&]<int kHeld>(unsigned threads) {
    token_thresholds_kernel<value_t, kHeld>
        <<<grid, threads, 0, stream>>>(static_cast<const value_t*>(choice.columns), choice.padding,
                                       choice.tokens, length, choice.top_k, choice.thresholds);
  };
  if (length <= 16 * 1024) {
    launch.template operator()<16>(grid_size(divide_up(length, 16 * kWarp) * kWarp));
  } else if (length <= 32 * 1024 && std::is_same_v<value_t, float>) {
    launch.template operator()<32>(1024);
  } else {
    launch.template operator()<0>(1024);
  }
  check_launch("token_thresholds");
}

}  // namespace

void launch_choose_tokens(Scalar scalar, const TokenChoice& choice, cudaStream_t stream) {
  dispatch_value(scalar, [&](auto zero) {
    using value_t = decltype(zero);
    const auto* const logits = static_cast<const value_t*>(choice.logits);
    const auto experts = static_cast<int>(choice.experts);
    score_columns_kernel<value_t>
        <<<grid_size(divide_up(choice.tokens, kWarp)), kWarp * kWarp, 0, stream>>>(
            logits, choice.tokens, experts, choice.softmax, static_cast<value_t*>(choice.columns));
    check_launch("score_columns");
    launch_token_thresholds<value_t>(choice, stream);
    chosen_experts_kernel<value_t>
        <<<grid_size(divide_up(choice.tokens, kThreads / kWarp)), kThreads, 0, stream>>>(
            logits, choice.padding, choice.tokens, choice.length, experts, choice.softmax,
            choice.thresholds, choice.expert_ids);
    check_launch("chosen_experts");
  });
}

void launch_bias_histogram(Scalar scalar, int64_t tokens, int64_t experts, int64_t top_k,
                           const BiasScores& given, int64_t bins, int64_t* histogram,
                           cudaStream_t stream) {
  if (tokens == 0) {
    return;
  }
  dispatch_value(scalar, [&](auto zero) {
    using value_t = decltype(zero);
    const auto* const scores = static_cast<const value_t*>(given.scores);
    auto* const cutoffs = static_cast<value_t*>(given.cutoffs);
    dispatch_experts(experts, [&](auto lanes, auto per_lane) {
      constexpr int kLanes = decltype(lanes)::value;
      const unsigned blocks = grid_size(divide_up(tokens, kThreads / kLanes));
      choice_cutoffs_kernel<value_t, kLanes, decltype(per_lane)::value>
          <<<blocks, kThreads, 0, stream>>>(scores, static_cast<const value_t*>(given.bias),
                                            given.padding, tokens, static_cast<int>(experts),
                                            static_cast<int>(top_k), cutoffs);
      check_launch("choice_cutoffs");
    });
    const BiasBins<value_t> of_type{static_cast<const value_t*>(given.least_bias),
                                    static_cast<const value_t*>(given.largest_bias),
                                    static_cast<int>(bins),
                                    reinterpret_cast<unsigned long long*>(histogram)};
    constexpr int64_t kBlocks = 2;  // of a multiprocessor
    const int64_t groups = divide_up(experts, kBinnedExperts);
    const int64_t slices = std::min(divide_up(tokens, kThreads / kBinnedExperts),
                                    divide_up(kBlocks * multiprocessors(), groups));
    const size_t shared = kBinnedExperts * bins * sizeof(unsigned);
    allow_shared_memory(bias_histogram_kernel<value_t>, shared);
    bias_histogram_kernel<value_t>
        <<<dim3(grid_size(slices), grid_size(groups, kMostGridRows)), kThreads, shared, stream>>>(
            scores, cutoffs, tokens, static_cast<int>(experts), of_type);
    check_launch("bias_histogram");
  });
}

}  // namespace anabranch::cuda
