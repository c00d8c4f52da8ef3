#include "placement/moves.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "support/sum.h"

namespace anabranch {
namespace {

/// Of the fullest rank's expert with another's.
struct Swap {
  int64_t own = -1;  ///< local; −1: there is none
  int64_t rank = 0;
  int64_t local = 0;
  int64_t fuller = 0;  ///< load of the fuller one of the two ranks behind it
};

class Swaps {
 public:
  Swaps(const std::vector<int64_t>& loads, ExpertPlacement placement)
      : loads_(loads), placement_(std::move(placement)), of_rank_(placement_.num_ranks, 0) {
    for (int64_t rank = 0; rank < placement_.num_ranks; ++rank) {
      for (int64_t local = 0; local < placement_.local_experts(rank); ++local) {
        of_rank_[rank] += load(rank, local);
      }
    }
  }

  int64_t fullest() const {
    return std::max_element(of_rank_.begin(), of_rank_.end()) - of_rank_.begin();
  }
  double fullest_over_mean() const {
    const auto all = static_cast<double>(sum(of_rank_));
    const auto ranks = static_cast<double>(of_rank_.size());
    return all == 0 ? 1 : static_cast<double>(of_rank_[fullest()]) * ranks / all;
  }

  /// The one that leaves least on the fuller one of two ranks, with the ranks that `may` says.
  template <typename May>
  Swap best(const May& may) const {
    const int64_t rank = fullest();
    Swap best{.fuller = of_rank_[rank]};
    for (int64_t other = 0; other < placement_.num_ranks; ++other) {
      if (other == rank || !may(other)) continue;
      for (int64_t own = 0; own < placement_.local_experts(rank); ++own) {
        for (int64_t local = 0; local < placement_.local_experts(other); ++local) {
          const int64_t less = load(rank, own) - load(other, local);
          const int64_t fuller = std::max(of_rank_[rank] - less, of_rank_[other] + less);
          if (fuller < best.fuller) best = {own, other, local, fuller};
        }
      }
    }
    return best;
  }

  void make(const Swap& swap) {
    const int64_t rank = fullest();
    const int64_t less = load(rank, swap.own) - load(swap.rank, swap.local);
    std::swap(placement_.held[rank][swap.own], placement_.held[swap.rank][swap.local]);
    of_rank_[rank] -= less;
    of_rank_[swap.rank] += less;
  }

  const ExpertPlacement& placement() const { return placement_; }

 private:
  int64_t load(int64_t rank, int64_t local) const {
    return loads_[placement_.held[rank][local].expert];
  }

  const std::vector<int64_t>& loads_;
  ExpertPlacement placement_;
  std::vector<int64_t> of_rank_;
};

}  // namespace

MoveChoice choose_moves(const std::vector<int64_t>& loads, const ExpertPlacement& from,
                        const std::vector<int>& node_of, double least_gain) {
  Swaps swaps(loads, from);
  MoveChoice choice{from, swaps.fullest_over_mean(), swaps.fullest_over_mean()};
  // Each swap leaves less on the fullest rank, or as much on fewer: so they end. No more of them than experts.
  for (int64_t i = 0; i < from.num_experts; ++i) {
    const int node = node_of[swaps.fullest()];
    auto swap = swaps.best([&](int64_t other) { return node_of[other] == node; });
    if (swap.own < 0) swap = swaps.best([](int64_t) { return true; });
    if (swap.own < 0) break;
    swaps.make(swap);
  }
  if (swaps.fullest_over_mean() < (1 - least_gain) * choice.before) {
    choice.placement = swaps.placement();
    choice.after = swaps.fullest_over_mean();
  }
  return choice;
}

}  // namespace anabranch
