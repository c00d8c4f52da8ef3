#include "balance/loads.h"

#include <algorithm>
#include <tuple>
#include <utility>

#include "support/sum.h"

namespace anabranch {

std::vector<std::vector<int64_t>> loans_by_borrower(const std::vector<Loan>& loans, int64_t ranks) {
  std::vector<std::vector<int64_t>> by_borrower(ranks);
  for (size_t loan = 0; loan < loans.size(); ++loan) {
    for (const int64_t borrower : loans[loan].borrowers) {
      by_borrower[borrower].push_back(static_cast<int64_t>(loan));
    }
  }
  return by_borrower;
}

Loads::Loads(const torch::Tensor& counts, const ExpertPlacement& placement)
    : placement_(placement),
      owner_of_(placement.num_experts),
      left_(placement.num_experts * placement.num_ranks),
      computed_(placement.num_ranks, 0),
      moved_(computed_),
      lent_(computed_),
      borrowed_(computed_),
      loan_of_(placement.num_experts) {
  const auto contiguous = counts.contiguous();
  const auto* of_source = contiguous.const_data_ptr<int64_t>();
  for (int64_t owner = 0; owner < ranks(); ++owner) {
    for (int64_t local = 0; local < placement.local_experts(owner); ++local) {
      const int64_t expert = placement.at(owner, local).expert;
      owner_of_[expert] = owner;
      loan_of_[expert].expert = expert;
      loan_of_[expert].owner = owner;
      for (int64_t source = 0; source < ranks(); ++source) {
        const int64_t count = of_source[source * experts() + expert];
        left_[expert * ranks() + source] = count;
        computed_[owner] += count;
        moved_[source] += source == owner ? 0 : count;
        moved_[owner] += source == owner ? 0 : count;
      }
    }
  }
}

int64_t Loads::left(int64_t expert) const {
  int64_t sum = 0;
  for (int64_t source = 0; source < ranks(); ++source) sum += left(source, expert);
  return sum;
}

void Loads::borrow(int64_t expert, int64_t borrower) {
  auto& borrowers = loan_of_[expert].borrowers;
  const auto place = std::lower_bound(borrowers.begin(), borrowers.end(), borrower);
  if (place != borrowers.end() && *place == borrower) return;
  if (borrowers.empty()) ++lent_[owner_of_[expert]];
  ++borrowed_[borrower];
  borrowers.insert(place, borrower);
}

int64_t Loads::lend(int64_t expert, const Share& share) {
  const auto [source, borrower, wanted] = share;
  const int64_t owner = owner_of_[expert];
  int64_t& left = left_[expert * ranks() + source];
  const int64_t given = std::min(wanted, left);
  if (given == 0) return 0;
  borrow(expert, borrower);
  left -= given;
  computed_[owner] -= given;
  computed_[borrower] += given;
  const auto move = [&](int64_t rank, int64_t rows) {
    if (rank == source) return;
    moved_[source] += rows;
    moved_[rank] += rows;
  };
  move(owner, -given);
  move(borrower, given);
  loan_of_[expert].shares.push_back(share);
  loan_of_[expert].shares.back().assignments = given;
  return given;
}

void Loads::shadow(int64_t expert) {
  for (int64_t rank = 0; rank < ranks(); ++rank) {
    if (rank != owner_of_[expert]) lend(expert, {rank, rank, left(rank, expert)});
  }
}

StepForecast Loads::forecast(const StepCosts& costs) const {
  const auto most = [](const std::vector<int64_t>& of_ranks) {
    return *std::max_element(of_ranks.begin(), of_ranks.end());
  };
  const auto travelling = static_cast<double>(most(lent_) + most(borrowed_));
  return {most(computed_), static_cast<double>(most(computed_)) * costs.assignment +
                               static_cast<double>(most(moved_)) * costs.row +
                               travelling * costs.expert};
}

double Loads::least_seconds(const StepCosts& costs) const {
  const double mean = static_cast<double>(sum(computed_)) / static_cast<double>(ranks());
  return mean * costs.assignment + 2 * costs.expert;  // over an owner's link, and a borrower's
}

namespace {

/// By (source, borrower), each once.
void arrange(std::vector<Share>& shares) {
  const auto key = [](const Share& share) { return std::tie(share.source, share.borrower); };
  std::sort(shares.begin(), shares.end(),
            [&](const Share& one, const Share& other) { return key(one) < key(other); });
  std::vector<Share> sums;
  for (const Share& share : shares) {
    if (!sums.empty() && key(sums.back()) == key(share)) {
      sums.back().assignments += share.assignments;
    } else {
      sums.push_back(share);
    }
  }
  shares = std::move(sums);
}

}  // namespace

std::vector<Loan> Loads::loans() const {
  std::vector<Loan> loans;
  for (const auto& [expert, slice, slices] : placement_.all()) {
    if (loan_of_[expert].borrowers.empty()) continue;
    Loan& loan = loans.emplace_back(loan_of_[expert]);
    const auto left = left_.begin() + expert * ranks();
    loan.left.assign(left, left + ranks());
    arrange(loan.shares);
  }
  return loans;
}

}  // namespace anabranch
