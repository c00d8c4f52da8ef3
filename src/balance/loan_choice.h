#pragma once

#include <cstdint>
#include <vector>

#include "balance/loads.h"

namespace anabranch {

/// What is lent in a step, and what that is good for.
struct LoanChoice {
  std::vector<Loan> loans;  ///< by the expert's place
  StepForecast without;
  StepForecast with;
};

// Of `counts` and `placement` as Loads has them. By `costs` nothing is lent where that gains less than 5 %.

/// Shadowed experts: lent to all ranks, each of which computes its own tokens. FasterMoE's choice
/// (doi:10.1145/3503221.3508418): experts by falling load, as long as the step is foreseen to become shorter; of all
/// such beginnings the best.
LoanChoice choose_shadows(const torch::Tensor& counts, const ExpertPlacement& placement,
                          const StepCosts& costs);

/// Replicas: the fullest rank lends the expert of which it computes most to the emptiest one, with as many of its
/// assignments as bring one of both to the mean, the borrower's own tokens first; again and again, until no rank
/// computes more than 1.05 times the mean. Whatever it costs.
LoanChoice choose_replicas(const torch::Tensor& counts, const ExpertPlacement& placement,
                           const StepCosts& costs);

/// Gathered experts: the ranks lie in groups of so many, in their order, in which tokens do not travel, but the weights
/// of the experts that they have: Tutel's parallelism between experts and data (arXiv:2206.03382), switched at each step. Tokens
/// for experts of another group go to the rank in it that has their rank's place. Whatever it costs.
LoanChoice choose_gathered(const torch::Tensor& counts, const ExpertPlacement& placement,
                           const StepCosts& costs, int64_t group);

/// The one of these, of all beginnings of replicas and all groups, that is foreseen to make the step shortest.
LoanChoice choose_cheapest(const torch::Tensor& counts, const ExpertPlacement& placement,
                           const StepCosts& costs);

}  // namespace anabranch
