#include "balance/loan_choice.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "support/sum.h"

namespace anabranch {
namespace {

std::vector<int64_t> experts_by_load(const Loads& loads) {
  std::vector<int64_t> by_load(loads.experts());
  std::iota(by_load.begin(), by_load.end(), 0);
  std::stable_sort(by_load.begin(), by_load.end(),
                   [&](int64_t one, int64_t other) { return loads.left(one) > loads.left(other); });
  return by_load;
}

/// Takes a step of the choice of replicas; false where no rank computes more than `most` times the mean.
bool lend_to_the_emptiest(Loads& loads, double most) {
  const auto& computed = loads.computed();
  const auto fullest = std::max_element(computed.begin(), computed.end());
  const auto emptiest = std::min_element(computed.begin(), computed.end());
  const int64_t all = sum(computed);
  if (static_cast<double>(*fullest * loads.ranks()) <= most * static_cast<double>(all))
    return false;
  const int64_t mean = all / loads.ranks();
  int64_t wanted = std::min(*fullest - mean, mean - *emptiest);
  if (wanted <= 0) return false;
  const int64_t owner = fullest - computed.begin();
  const int64_t borrower = emptiest - computed.begin();
  int64_t expert = -1;
  for (int64_t other = 0; other < loads.experts(); ++other) {
    if (loads.owner_of(other) != owner) continue;
    if (expert < 0 || loads.left(other) > loads.left(expert)) expert = other;
  }
  const auto lend = [&](int64_t source) {
    wanted -= loads.lend(expert, {source, borrower, wanted});
  };
  lend(borrower);  // the owner's own last: they need not travel at all
  for (int64_t source = 0; source < loads.ranks(); ++source) {
    if (source != owner) lend(source);
  }
  lend(owner);
  return true;
}

/// As many steps as make a training step shortest; `take` takes one, and returns false where there is none left.
template <typename Take>
LoanChoice best_beginning(const Loads& all_owned, const StepCosts& costs, const Take& take) {
  const StepForecast without = all_owned.forecast(costs);
  LoanChoice choice{{}, without, without};
  const double most = 0.95 * without.seconds;
  if (all_owned.least_seconds(costs) > most) return choice;
  Loads loads = all_owned;
  int64_t best = 0;
  for (int64_t step = 0; take(loads, step); ++step) {
    const StepForecast forecast = loads.forecast(costs);
    if (forecast.seconds < choice.with.seconds) {
      choice.with = forecast;
      best = step + 1;
    }
  }
  if (choice.with.seconds > most) return {{}, without, without};
  loads = all_owned;
  for (int64_t step = 0; step < best; ++step) take(loads, step);
  choice.loans = loads.loans();
  return choice;
}

}  // namespace

LoanChoice choose_shadows(const torch::Tensor& counts, const ExpertPlacement& placement,
                          const StepCosts& costs) {
  const Loads all_owned(counts, placement);
  const auto by_load = experts_by_load(all_owned);
  return best_beginning(all_owned, costs, [&](Loads& loads, int64_t step) {
    if (step == loads.experts()) return false;
    loads.shadow(by_load[step]);
    return true;
  });
}

LoanChoice choose_replicas(const torch::Tensor& counts, const ExpertPlacement& placement,
                           const StepCosts& costs) {
  Loads loads(counts, placement);
  const StepForecast without = loads.forecast(costs);
  while (lend_to_the_emptiest(loads, /*most=*/1.05)) {
  }
  return {loads.loans(), without, loads.forecast(costs)};
}

LoanChoice choose_gathered(const torch::Tensor& counts, const ExpertPlacement& placement,
                           const StepCosts& costs, int64_t group) {
  Loads loads(counts, placement);
  const StepForecast without = loads.forecast(costs);
  for (int64_t expert = 0; expert < loads.experts(); ++expert) {
    const int64_t owner = loads.owner_of(expert);
    for (int64_t source = 0; source < loads.ranks(); ++source) {
      const int64_t borrower = owner - owner % group + source % group;
      if (borrower == owner) continue;
      loads.lend(expert, {source, borrower, loads.left(source, expert)});
    }
  }
  return {loads.loans(), without, loads.forecast(costs)};
}

LoanChoice choose_cheapest(const torch::Tensor& counts, const ExpertPlacement& placement,
                           const StepCosts& costs) {
  LoanChoice best = choose_shadows(counts, placement, costs);
  const double most = 0.95 * best.without.seconds;
  const Loads all_owned(counts, placement);
  if (all_owned.least_seconds(costs) > most) return best;
  const auto consider = [&](LoanChoice other) {
    if (other.with.seconds <= most && other.with.seconds < best.with.seconds) {
      best = std::move(other);
    }
  };
  consider(best_beginning(all_owned, costs, [](Loads& loads, int64_t) {
    return lend_to_the_emptiest(loads, /*most=*/1);
  }));
  for (int64_t group = 2; group <= placement.num_ranks; ++group) {
    if (placement.num_ranks % group != 0) continue;
    consider(choose_gathered(counts, placement, costs, group));
  }
  return best;
}

}  // namespace anabranch
