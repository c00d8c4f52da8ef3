#include "balance/shadow_choice.h"

#include <algorithm>
#include <numeric>

namespace anabranch {
namespace {

/// Work and rows of every rank, of which expert after expert becomes shadowed.
class Loads {
 public:
  Loads(const torch::Tensor& counts, const ExpertPlacement& placement)
      : counts_(counts.contiguous()),
        owner_of_(placement.num_experts),
        computed_(placement.num_ranks, 0),
        moved_(computed_) {
    for (int64_t owner = 0; owner < placement.num_ranks; ++owner) {
      for (int64_t local = 0; local < placement.local_experts(owner); ++local) {
        const int64_t expert = placement.at(owner, local).expert;
        owner_of_[expert] = owner;
        move(expert, +1);
        computed_[owner] += of(owner, expert);
      }
    }
  }

  int64_t load(int64_t expert) const {
    int64_t sum = 0;
    for (int64_t source = 0; source < ranks(); ++source) sum += of(source, expert);
    return sum;
  }
  void shadow(int64_t expert) {
    move(expert, -1);
    for (int64_t source = 0; source < ranks(); ++source) {
      computed_[source] += source == owner_of_[expert] ? 0 : of(source, expert);
    }
  }
  StepForecast forecast(const StepCosts& costs, int64_t shadows) const {
    const int64_t most = *std::max_element(computed_.begin(), computed_.end());
    const int64_t rows = *std::max_element(moved_.begin(), moved_.end());
    return {most, static_cast<double>(most) * costs.assignment +
                      static_cast<double>(rows) * costs.row +
                      static_cast<double>(shadows) * costs.expert};
  }

 private:
  int64_t ranks() const { return static_cast<int64_t>(computed_.size()); }
  int64_t of(int64_t source, int64_t expert) const {
    return counts_.const_data_ptr<int64_t>()[source * counts_.size(1) + expert];
  }
  /// Others' tokens to the owner of their expert, or, with −1, not.
  void move(int64_t expert, int64_t sign) {
    const int64_t owner = owner_of_[expert];
    for (int64_t source = 0; source < ranks(); ++source) {
      if (source == owner) continue;
      const int64_t rows = sign * of(source, expert);
      computed_[owner] += rows;
      moved_[source] += rows;
      moved_[owner] += rows;
    }
  }

  torch::Tensor counts_;
  std::vector<int64_t> owner_of_;
  std::vector<int64_t> computed_;  ///< [W] assignments
  std::vector<int64_t> moved_;     ///< [W] to and from others
};

}  // namespace

ShadowChoice choose_shadows(const torch::Tensor& counts, const ExpertPlacement& placement,
                            const StepCosts& costs) {
  Loads loads(counts, placement);
  std::vector<int64_t> by_load(placement.num_experts);
  std::iota(by_load.begin(), by_load.end(), 0);
  std::stable_sort(by_load.begin(), by_load.end(),
                   [&](int64_t one, int64_t other) { return loads.load(one) > loads.load(other); });
  ShadowChoice choice;
  choice.without = choice.with = loads.forecast(costs, 0);
  int64_t best = 0;
  for (int64_t shadows = 1; shadows <= placement.num_experts; ++shadows) {
    if (static_cast<double>(shadows) * costs.expert >= choice.with.seconds) break;
    loads.shadow(by_load[shadows - 1]);
    const StepForecast forecast = loads.forecast(costs, shadows);
    if (forecast.seconds < choice.with.seconds) {
      choice.with = forecast;
      best = shadows;
    }
  }
  if (choice.with.seconds > 0.95 * choice.without.seconds) {
    choice.with = choice.without;
    best = 0;
  }
  choice.experts.assign(by_load.begin(), by_load.begin() + best);
  const auto place_of = placement.place_of_experts();
  std::sort(choice.experts.begin(), choice.experts.end(),
            [&](int64_t one, int64_t other) { return place_of[one] < place_of[other]; });
  return choice;
}

}  // namespace anabranch
