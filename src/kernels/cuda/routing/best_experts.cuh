#pragma once

#include "kernels/cuda/routing/routing.cuh"

namespace anabranch::cuda {

/// A token's experts, of which its lanes together take the best one by one, of equal ones the lowest first. What they are
/// chosen by, `choice_at(expert, r)`, is a number; of the r-th of a lane (Lanes::for_each_expert).
template <typename value_t, int kLanes, int kPerLane, typename ChoiceAt>
class BestExperts {
 public:
  __device__ __forceinline__ BestExperts(const Lanes<value_t, kLanes>& lanes, int experts,
                                         const ChoiceAt& choice_at)
      : lanes_(lanes), num_experts_(experts), choice_at_(choice_at) {
    if constexpr (kPerLane > 0) {
#pragma unroll
      for (int r = 0; r < kPerLane; ++r) {
        keys_[r] = 0;
        if constexpr (kSorted) experts_[r] = kNobody;
      }
      lanes_.template for_each_expert<kPerLane>(experts, [&](int expert, int r) {
        keys_[r] = key_of(choice_at(expert, r));
        if constexpr (kSorted) experts_[r] = expert;
      });
    }
    if constexpr (kSorted) {
      sort();
    }
  }

  /// The same on every lane.
  __device__ __forceinline__ int take() {
    if constexpr (kSorted) {
      key_ = keys_[0];
      expert_ = experts_[0];
      lanes_.best(key_, expert_);
      if (experts_[0] == expert_) {
#pragma unroll
        for (int r = 1; r < kPerLane; ++r) {
          keys_[r - 1] = keys_[r];
          experts_[r - 1] = experts_[r];
        }
        keys_[kPerLane - 1] = 0;
        experts_[kPerLane - 1] = kNobody;
      }
    } else {
      lanes_.template next<kPerLane>(key_, expert_, 0, num_experts_, [&](int expert, int r) {
        return kPerLane > 0 ? keys_[r] : key_of(choice_at_(expert, r));
      });
    }
    return expert_;
  }

  /// What the last one was taken for.
  __device__ value_t choice() const { return value_of(key_); }

 private:
  using Key = key_t<value_t>;
  /// Each lane keeps its own best first: as many as pay.
  static constexpr bool kSorted = kPerLane > 0 && kPerLane <= 8;

  /// Neighbours change places, which leaves equal ones in order.
  __device__ __forceinline__ void sort() {
#pragma unroll
    for (int end = kPerLane - 1; end > 0; --end) {
#pragma unroll
      for (int r = 0; r < end; ++r) {
        const bool wrong = keys_[r] < keys_[r + 1];
        const Key key = wrong ? keys_[r + 1] : keys_[r];
        keys_[r + 1] = wrong ? keys_[r] : keys_[r + 1];
        keys_[r] = key;
        const int expert = wrong ? experts_[r + 1] : experts_[r];
        experts_[r + 1] = wrong ? experts_[r] : experts_[r + 1];
        experts_[r] = expert;
      }
    }
  }

  const Lanes<value_t, kLanes>& lanes_;
  int num_experts_;
  const ChoiceAt& choice_at_;
  Key keys_[kPerLane > 0 ? kPerLane : 1];
  int experts_[kSorted ? kPerLane : 1];
  Key key_ = ~Key{0};
  int expert_ = -1;
};

/// Called with its types: BestExperts<value_t, kLanes, kPerLane, _>.
template <int kPerLane, typename value_t, int kLanes, typename ChoiceAt>
__device__ __forceinline__ auto best_experts(const Lanes<value_t, kLanes>& lanes, int experts,
                                             const ChoiceAt& choice_at) {
  return BestExperts<value_t, kLanes, kPerLane, ChoiceAt>(lanes, experts, choice_at);
}

}  // namespace anabranch::cuda
