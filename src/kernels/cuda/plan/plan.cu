#include <algorithm>

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/plan/plan.h"
#include "kernels/cuda/plan/running_sums.cuh"

// Integers only, and integer atomics only where the result does not depend on their order: the plan
// is the same in every run.

namespace anabranch::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

__device__ __forceinline__ int64_t thread_index() {
  return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
}

unsigned grid_for(int64_t threads) { return grid_size(divide_up(threads, kThreads)); }

/// A warp per token.
template <typename value_t>
__global__ void __launch_bounds__(kThreads)
    check_routing_kernel(const int64_t* __restrict__ expert_ids,
                         const value_t* __restrict__ weights, int64_t tokens, int64_t top_k,
                         int64_t num_experts, int64_t least_id, unsigned long long* first_nonfinite,
                         unsigned long long* first_invalid, value_t* __restrict__ checked_weights) {
  const int64_t token = thread_index() / kWarp;
  if (token >= tokens) {
    return;
  }
  const int64_t* ids = expert_ids + token * top_k;
  bool valid = true;
  bool finite = true;
  for (int64_t slot = threadIdx.x % kWarp; slot < top_k; slot += kWarp) {
    const int64_t id = ids[slot];
    valid = valid && id >= least_id && id < num_experts;
    finite = finite && ((id < 0 && id >= least_id) || isfinite(weights[token * top_k + slot]));
    for (int64_t other = 0; other < slot; ++other) {
      valid = valid && (ids[other] != id || id < 0);
    }
  }
  valid = __all_sync(kFullMask, valid);
  finite = __all_sync(kFullMask, finite);
  if (threadIdx.x % kWarp == 0 && !valid) {
    atomicMin(first_invalid, static_cast<unsigned long long>(token));
  }
  if (threadIdx.x % kWarp == 0 && !finite) {
    atomicMin(first_nonfinite, static_cast<unsigned long long>(token));
  }
  for (int64_t slot = threadIdx.x % kWarp; slot < top_k; slot += kWarp) {
    const int64_t i = token * top_k + slot;
    checked_weights[i] = valid && finite ? weights[i] : value_t(NAN);
  }
}

// --- group: a stable radix sort of positions by key -------------------------------------------

constexpr int kMostDigitBits = 10;
constexpr int kItems = 8;                 // of a thread
constexpr int kTile = kThreads * kItems;  // of a block
constexpr int kMostDigits = 1 << kMostDigitBits;

/// One pass: by the digit (key >> shift) & (digits − 1).
struct DigitPass {
  const int64_t* keys;
  const int64_t* members;  // null: positions themselves
  int64_t count;
  int64_t largest_key;
  int shift;
  int digits;
  int64_t blocks;
  int64_t* offsets;  // [largest_key + 2] first place of each key, or null

  __device__ int64_t key(int64_t i) const {  // a negative key is a large one
    return static_cast<int64_t>(
        min(static_cast<uint64_t>(keys[i]), static_cast<uint64_t>(largest_key)));
  }
  __device__ int digit(int64_t key) const { return static_cast<int>(key >> shift) & (digits - 1); }
};

/// histogram [digits, blocks]. One block alone has counted all: then nothing comes before its own, and
/// `totals`, null otherwise, are its counts.
__global__ void __launch_bounds__(kThreads)
    count_digits_kernel(DigitPass pass, int64_t* __restrict__ histogram,
                        int64_t* __restrict__ totals) {
  __shared__ int counts[kMostDigits];
  for (int digit = threadIdx.x; digit < pass.digits; digit += kThreads) {
    counts[digit] = 0;
  }
  __syncthreads();
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kTile;
  const int64_t end = min(begin + kTile, pass.count);
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    atomicAdd(&counts[pass.digit(pass.key(i))], 1);
  }
  __syncthreads();
  for (int digit = threadIdx.x; digit < pass.digits; digit += kThreads) {
    histogram[digit * pass.blocks + blockIdx.x] = totals != nullptr ? 0 : counts[digit];
    if (totals != nullptr) totals[digit] = counts[digit];
  }
}

/// A block per digit: its counts per block become an exclusive running sum, `totals` their sum.
__global__ void __launch_bounds__(kThreads)
    scan_digits_kernel(int64_t blocks, int64_t* __restrict__ histogram,
                       int64_t* __restrict__ totals) {
  int64_t* counts = histogram + blockIdx.x * blocks;
  int64_t carry = 0;
  for (int64_t base = 0; base < blocks; base += kThreads) {
    const int64_t i = base + threadIdx.x;
    int64_t total;
    const int64_t before = block_exclusive_sum<kThreads>(i < blocks ? counts[i] : 0, total);
    if (i < blocks) {
      counts[i] = carry + before;
    }
    carry += total;
  }
  if (threadIdx.x == 0) {
    totals[blockIdx.x] = carry;
  }
}

/// Where each digit's elements of this block begin, into `first` [digits] of shared memory.
__device__ void find_first_places(const DigitPass& pass, const int64_t* histogram,
                                  const int64_t* totals, int64_t* first) {
  int64_t carry = 0;
  for (int base = 0; base < pass.digits; base += kThreads) {
    const int digit = base + threadIdx.x;
    const bool exists = digit < pass.digits;
    int64_t total;
    const int64_t smaller = block_exclusive_sum<kThreads>(exists ? totals[digit] : 0, total);
    if (exists) {
      first[digit] = carry + smaller + histogram[digit * pass.blocks + blockIdx.x];
    }
    carry += total;
  }
}

/// Each warp takes kItems · 32 consecutive elements in order.
__global__ void __launch_bounds__(kThreads)
    place_kernel(DigitPass pass, const int64_t* __restrict__ histogram,
                 const int64_t* __restrict__ totals, int64_t* __restrict__ keys_out,
                 int64_t* __restrict__ members_out) {
  __shared__ int64_t first[kMostDigits];
  extern __shared__ int seen[];  // [kWarps, digits]: of each digit, by each warp
  for (int i = threadIdx.x; i < kWarps * pass.digits; i += kThreads) {
    seen[i] = 0;
  }
  find_first_places(pass, histogram, totals, first);
  __syncthreads();
  if (pass.offsets != nullptr && blockIdx.x == 0) {  // where a block's begin, all begin
    for (int64_t key = threadIdx.x; key <= pass.largest_key + 1; key += kThreads) {
      pass.offsets[key] = key <= pass.largest_key ? first[key] : pass.count;
    }
  }
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  int* own_seen = seen + warp * pass.digits;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kTile + warp * kItems * kWarp + lane;
  int64_t keys[kItems];
  int rank[kItems];  // among the warp's elements of the same digit
#pragma unroll
  for (int item = 0; item < kItems; ++item) {
    const int64_t i = begin + item * kWarp;
    const unsigned active = __ballot_sync(kFullMask, i < pass.count);
    if (i < pass.count) {
      keys[item] = pass.key(i);
      const int digit = pass.digit(keys[item]);
      const unsigned peers = __match_any_sync(active, digit);
      const unsigned before = peers & ((1u << lane) - 1);
      rank[item] = own_seen[digit] + __popc(before);
      __syncwarp(active);
      if (before == 0) {
        own_seen[digit] += __popc(peers);
      }
    }
    __syncwarp();
  }
  __syncthreads();
  for (int digit = threadIdx.x; digit < pass.digits; digit += kThreads) {
    int sum = 0;
    for (int w = 0; w < kWarps; ++w) {
      const int count = seen[w * pass.digits + digit];
      seen[w * pass.digits + digit] = sum;
      sum += count;
    }
  }
  __syncthreads();
#pragma unroll
  for (int item = 0; item < kItems; ++item) {
    const int64_t i = begin + item * kWarp;
    if (i < pass.count) {
      const int digit = pass.digit(keys[item]);
      const int64_t place = first[digit] + own_seen[digit] + rank[item];
      keys_out[place] = keys[item];
      members_out[place] = pass.members != nullptr ? pass.members[i] : i;
    }
  }
}

/// offsets[g] is the number of keys below g.
__global__ void __launch_bounds__(kThreads)
    find_offsets_kernel(const int64_t* __restrict__ sorted_keys, int64_t count, int64_t groups,
                        int64_t* __restrict__ offsets) {
  const int64_t group = thread_index();
  if (group <= groups) {
    offsets[group] = group == groups ? count : upper_bound(sorted_keys, count, group - 1);
  }
}

int bits_of(int64_t groups) {
  int bits = 0;
  while (groups - 1 >> bits > 0) {
    ++bits;
  }
  return std::max(bits, 1);
}

// --- send plan and arrivals ---------------------------------------------------------------------

/// A thread per token; top_k is small.
__global__ void __launch_bounds__(kThreads)
    token_ranks_kernel(const int64_t* __restrict__ expert_ids, int64_t tokens, int64_t top_k,
                       const int64_t* __restrict__ first_expert, int64_t ranks, TokenRanks pairs) {
  const int64_t token = thread_index();
  if (token >= tokens) {
    return;
  }
  const int64_t begin = token * top_k;
  int64_t distinct = 0;
  for (int64_t i = begin; i < begin + top_k; ++i) {
    if (expert_ids[i] < 0) {
      pairs.first[i] = i;
      pairs.key[i] = ranks;
      continue;
    }
    // An expert beyond the last counts as the last rank's.
    const int64_t rank = min(upper_bound(first_expert + 1, ranks, expert_ids[i]), ranks - 1);
    int64_t first = begin;
    while (first < i && pairs.key[first] != rank) {
      ++first;
    }
    pairs.first[i] = first;
    pairs.key[i] = first == i ? rank : ranks;
    distinct += first == i;
  }
  pairs.ranks[token] = distinct;
}

__global__ void __launch_bounds__(kThreads)
    send_tokens_kernel(const int64_t* __restrict__ sent, int64_t count, int64_t top_k,
                       int64_t* __restrict__ send_tokens, int64_t* __restrict__ row_of) {
  const int64_t i = thread_index();
  if (i < count) {
    send_tokens[i] = sent[i] / top_k;
    row_of[sent[i]] = i;
  }
}

/// A thread for each number there is to be written at most. Places of a token's assignments ascend
/// with their experts, of equal ones (which are refused) with their slots.
__global__ void __launch_bounds__(kThreads) local_kernel(Local plan) {
  const int64_t i = thread_index();
  const int64_t assignments = plan.tokens * plan.top_k;
  if (i < plan.experts) {
    const auto rows_of = [&](int64_t expert) {
      return plan.expert_offsets[expert + 1] - plan.expert_offsets[expert];
    };
    const int64_t rows = rows_of(i);
    plan.expert_counts[i] = rows;
    int64_t before = 0;
#pragma unroll 8
    for (int64_t other = 0; other < plan.experts; ++other) {
      const int64_t of_other = rows_of(other);
      before += of_other > rows || (of_other == rows && other < i);
    }
    plan.longest_first[before] = i;
  }
  if (i <= plan.tokens) {
    plan.row_offsets[i] = i * plan.top_k;
  }
  if (i < max(plan.tokens + 1, assignments)) {
    plan.places[i] = i;
  }
  if (i == 0 && plan.told != nullptr) {
    if (*plan.first_nonfinite >= 0) plan.told[0] = *plan.first_nonfinite;
    if (plan.first_invalid != nullptr && *plan.first_invalid >= 0) {
      plan.told[1] = *plan.first_invalid;
    }
  }
  if (i >= assignments) {
    return;
  }
  const int64_t assignment = plan.send_order[i];
  const int64_t token = assignment / plan.top_k;
  const int64_t first = token * plan.top_k;
  // As the grouping takes ids: those outside are the last expert's.
  const auto expert_of = [&](int64_t at) {
    return min(static_cast<uint64_t>(plan.expert_ids[at]), static_cast<uint64_t>(plan.experts - 1));
  };
  const uint64_t expert = expert_of(assignment);
  int64_t before = 0;
  for (int64_t other = first; other < first + plan.top_k; ++other) {
    const uint64_t of_other = expert_of(other);
    before += of_other < expert || (of_other == expert && other < assignment);
  }
  plan.assignment_rows[i] = token;
  if (plan.weights != nullptr && plan.weights_are_double) {
    static_cast<double*>(plan.ordered_weights)[i] =
        static_cast<const double*>(plan.weights)[assignment];
  } else if (plan.weights != nullptr) {
    static_cast<float*>(plan.ordered_weights)[i] =
        static_cast<const float*>(plan.weights)[assignment];
  }
  plan.row_members[first + before] = i;
}

/// A thread per token: its rows in the order of their ranks.
__global__ void __launch_bounds__(kThreads)
    token_rows_kernel(TokenRanks pairs, const int64_t* __restrict__ row_of,
                      const int64_t* __restrict__ token_offsets, int64_t tokens, int64_t top_k,
                      int64_t ranks, int64_t* __restrict__ token_rows) {
  const int64_t token = thread_index();
  if (token >= tokens) {
    return;
  }
  const int64_t* key = pairs.key + token * top_k;
  for (int64_t slot = 0; slot < top_k; ++slot) {
    if (key[slot] == ranks) {
      continue;
    }
    int64_t lower = 0;
    for (int64_t other = 0; other < top_k; ++other) {
      lower += key[other] < key[slot];
    }
    token_rows[token_offsets[token] + lower] = row_of[token * top_k + slot];
  }
}

__global__ void __launch_bounds__(kThreads)
    segment_rows_kernel(const int64_t* __restrict__ send_order, int64_t count, TokenRanks pairs,
                        const int64_t* __restrict__ row_of, const int64_t* __restrict__ segments,
                        int32_t* __restrict__ segment_rows) {
  const int64_t i = thread_index();
  if (i < count) {
    const int64_t first = pairs.first[send_order[i]];
    segment_rows[i] = static_cast<int32_t>(row_of[first] - segments[pairs.key[first]]);
  }
}

/// A thread per assignment in expert-major order. What a failed exchange has left for row numbers leads
/// nowhere but to rows of their source, so that its error is the one that is heard. With `kMayLack` fewer may
/// have come.
template <bool kMayLack>
__global__ void __launch_bounds__(kThreads)
    order_arrivals_kernel(const int32_t* __restrict__ segment_rows, int64_t count,
                          const int64_t* __restrict__ source_ends,
                          const int64_t* __restrict__ expert_ends,
                          const int64_t* __restrict__ row_ends, int64_t ranks, int64_t experts,
                          int64_t none, int64_t* __restrict__ received_order,
                          int64_t* __restrict__ assignment_rows) {
  const int64_t p = thread_index();
  if (p >= count) {
    return;
  }
  const int64_t piece = upper_bound(expert_ends, experts * ranks, p);
  if (kMayLack && piece == experts * ranks) {
    received_order[p] = p;
    assignment_rows[p] = none;
    return;
  }
  const int64_t expert = piece / ranks;
  const int64_t rank = piece % ranks;
  const int64_t source_piece = rank * experts + expert;
  const int64_t within = p - (piece > 0 ? expert_ends[piece - 1] : 0);
  const int64_t arrived = within + (source_piece > 0 ? source_ends[source_piece - 1] : 0);
  received_order[p] = arrived;
  const int64_t first_row = rank > 0 ? row_ends[rank - 1] : 0;
  const int64_t row = first_row + max(segment_rows[arrived], 0);
  assignment_rows[p] = min(row, row_ends[rank] - 1);
}

}  // namespace

void launch_check_routing(const RoutingToCheck& routing, int64_t* first_nonfinite,
                          int64_t* first_invalid, void* checked_weights, cudaStream_t stream) {
  if (routing.tokens == 0) {
    return;
  }
  const auto launch = [&](auto zero) {
    using value_t = decltype(zero);
    check_routing_kernel<<<grid_for(routing.tokens * kWarp), kThreads, 0, stream>>>(
        routing.expert_ids, static_cast<const value_t*>(routing.weights), routing.tokens,
        routing.top_k, routing.num_experts, routing.least_id,
        reinterpret_cast<unsigned long long*>(first_nonfinite),
        reinterpret_cast<unsigned long long*>(first_invalid),
        static_cast<value_t*>(checked_weights));
    check_launch("check_routing");
  };
  routing.scalar == Scalar::kDouble ? launch(double{}) : launch(float{});
}

int64_t group_scratch(int64_t count, int64_t groups) {
  const int64_t digits = int64_t{1} << std::min(bits_of(groups), kMostDigitBits);
  return 3 * count + digits * divide_up(count, kTile) + digits;
}

void launch_group(const int64_t* keys, int64_t count, int64_t groups, int64_t* scratch,
                  int64_t* offsets, int64_t* members, cudaStream_t stream) {
  // Two buffers of keys and, beside `members`, one of members take turns.
  int64_t* const sorted_keys[2] = {scratch, scratch + count};
  int64_t* const spare_members = scratch + 2 * count;
  int64_t* const histogram = scratch + 3 * count;
  const int64_t blocks = divide_up(count, kTile);
  const int bits = bits_of(groups);
  const int passes = static_cast<int>(divide_up(bits, kMostDigitBits));
  const int digit_bits = static_cast<int>(divide_up(bits, passes));
  const int digits = 1 << digit_bits;
  int64_t* const totals = histogram + digits * blocks;
  const bool one_pass = passes == 1 && count > 0;
  DigitPass pass{keys, nullptr, count, groups - 1, 0, digits, blocks, one_pass ? offsets : nullptr};
  for (int i = 0; i < passes && count > 0; ++i, pass.shift += digit_bits) {
    int64_t* const target = (passes - i) % 2 == 1 ? members : spare_members;
    count_digits_kernel<<<grid_size(blocks), kThreads, 0, stream>>>(pass, histogram,
                                                                    blocks == 1 ? totals : nullptr);
    check_launch("count_digits");
    if (blocks > 1) {
      scan_digits_kernel<<<digits, kThreads, 0, stream>>>(blocks, histogram, totals);
      check_launch("scan_digits");
    }
    place_kernel<<<grid_size(blocks), kThreads, kWarps * digits * sizeof(int), stream>>>(
        pass, histogram, totals, sorted_keys[i % 2], target);
    check_launch("place");
    pass.keys = sorted_keys[i % 2];
    pass.members = target;
  }
  if (one_pass) {
    return;
  }
  find_offsets_kernel<<<grid_for(groups + 1), kThreads, 0, stream>>>(pass.keys, count, groups,
                                                                     offsets);
  check_launch("find_offsets");
}

void launch_token_ranks(const int64_t* expert_ids, int64_t tokens, int64_t top_k,
                        const int64_t* first_expert, int64_t ranks, const TokenRanks& pairs,
                        cudaStream_t stream) {
  if (tokens == 0) {
    return;
  }
  token_ranks_kernel<<<grid_for(tokens), kThreads, 0, stream>>>(expert_ids, tokens, top_k,
                                                                first_expert, ranks, pairs);
  check_launch("token_ranks");
}

void launch_send_tokens(const int64_t* sent, int64_t count, int64_t top_k, int64_t* send_tokens,
                        int64_t* row_of, cudaStream_t stream) {
  if (count == 0) {
    return;
  }
  send_tokens_kernel<<<grid_for(count), kThreads, 0, stream>>>(sent, count, top_k, send_tokens,
                                                               row_of);
  check_launch("send_tokens");
}

void launch_token_rows(const TokenRanks& pairs, const int64_t* row_of, const int64_t* token_offsets,
                       int64_t tokens, int64_t top_k, int64_t ranks, int64_t* token_rows,
                       cudaStream_t stream) {
  if (tokens == 0) {
    return;
  }
  token_rows_kernel<<<grid_for(tokens), kThreads, 0, stream>>>(pairs, row_of, token_offsets, tokens,
                                                               top_k, ranks, token_rows);
  check_launch("token_rows");
}

void launch_segment_rows(const int64_t* send_order, int64_t count, const TokenRanks& pairs,
                         const int64_t* row_of, const int64_t* segments, int32_t* segment_rows,
                         cudaStream_t stream) {
  if (count == 0) {
    return;
  }
  segment_rows_kernel<<<grid_for(count), kThreads, 0, stream>>>(send_order, count, pairs, row_of,
                                                                segments, segment_rows);
  check_launch("segment_rows");
}

void launch_local(const Local& plan, cudaStream_t stream) {
  const int64_t numbers = std::max({plan.experts, plan.tokens + 1, plan.tokens * plan.top_k});
  local_kernel<<<grid_for(numbers), kThreads, 0, stream>>>(plan);
  check_launch("local");
}

void launch_order_arrivals(const int32_t* segment_rows, int64_t count, const int64_t* source_ends,
                           const int64_t* expert_ends, const int64_t* row_ends, int64_t ranks,
                           int64_t experts, int64_t none, int64_t* received_order,
                           int64_t* assignment_rows, cudaStream_t stream) {
  if (count == 0) {
    return;
  }
  const auto kernel = none >= 0 ? order_arrivals_kernel<true> : order_arrivals_kernel<false>;
  kernel<<<grid_for(count), kThreads, 0, stream>>>(segment_rows, count, source_ends, expert_ends,
                                                   row_ends, ranks, experts, none, received_order,
                                                   assignment_rows);
  check_launch("order_arrivals");
}

}  // namespace anabranch::cuda
