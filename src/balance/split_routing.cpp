#include "balance/split_routing.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/full.h>
#include <ATen/ops/where.h>
#include <anabranch/communicator.h>

#include <algorithm>
#include <utility>

#include "exchange/arrange.h"
#include "support/numbers_on.h"
#include "support/sum.h"

namespace anabranch {
namespace {

/// A rank's assignments of lent experts by (loan, token), in groups that one rank computes.
struct Groups {
  std::vector<int64_t> places;  ///< of the exchange to the borrowers; −1: the owner's
  std::vector<int64_t> counts;
};
/// `first`: the first place of each rank.
Groups groups_of(const std::vector<Loan>& loans, int64_t source, std::vector<int64_t> first) {
  Groups groups;
  const auto add = [&](int64_t place, int64_t count) {
    groups.places.push_back(place);
    groups.counts.push_back(count);
  };
  for (const Loan& loan : loans) {
    for (const auto& [of, borrower, assignments] : loan.shares) {
      if (of == source) add(first[borrower], assignments);
    }
    add(-1, loan.left[source]);
    for (const int64_t borrower : loan.borrowers) ++first[borrower];
  }
  return groups;
}

/// [T, top_k] the place of each assignment that goes to a borrower; −1 of others.
torch::Tensor lent_ids(const torch::Tensor& ids, const std::vector<Loan>& loans,
                       int64_t num_experts, const Groups& groups) {
  const auto none = static_cast<int64_t>(loans.size());
  std::vector<int64_t> loan_of(num_experts + 1, none);  // the last: of no expert
  for (int64_t loan = 0; loan < none; ++loan) loan_of[loans[loan].expert] = loan;
  const int64_t count = sum(groups.counts);
  const auto by_loan = numbers_on(ids.device(), loan_of)
                           .index_select(0, at::where(ids < 0, num_experts, ids).flatten())
                           .argsort(/*stable=*/true, /*dim=*/0, /*descending=*/false)
                           .narrow(0, 0, count);
  const auto places = repeated(numbers_on(ids.device(), groups.places),
                               numbers_on(ids.device(), groups.counts), count);
  return at::full({ids.numel()}, -1, ids.options()).scatter_(0, by_loan, places).view(ids.sizes());
}

bool all_compute_their_own(const std::vector<Loan>& loans) {
  return std::all_of(loans.begin(), loans.end(), [](const Loan& loan) {
    return std::all_of(loan.shares.begin(), loan.shares.end(),
                       [](const Share& share) { return share.source == share.borrower; });
  });
}

}  // namespace

SplitRouting split_routing(const Routing& routing, const std::vector<Loan>& loans,
                           const Exchange& exchange) {
  const torch::NoGradGuard no_grad;
  const int64_t rank = exchange.communicator().rank();
  const int64_t ranks = exchange.communicator().size();
  const auto by_borrower = loans_by_borrower(loans, ranks);
  SplitRouting split{routing, routing, std::nullopt};
  std::vector<int64_t> first(ranks, 0);
  if (all_compute_their_own(loans)) {
    const auto borrowed = static_cast<int64_t>(by_borrower[rank].size());
    if (borrowed > 0) split.exchange.emplace(make_self_communicator(), borrowed);
  } else {
    ExpertPlacement places{0, ranks};
    for (int64_t borrower = 0; borrower < ranks; ++borrower) {
      first[borrower] = places.num_experts;
      auto& held = places.held.emplace_back();
      for (size_t i = 0; i < by_borrower[borrower].size(); ++i) {
        held.push_back({places.num_experts++});
      }
    }
    split.exchange.emplace(exchange.with(std::move(places)));
  }
  const auto& ids = routing.expert_ids;
  const auto lent = lent_ids(ids, loans, exchange.placement().num_experts,
                             groups_of(loans, rank, std::move(first)));
  split.owned.expert_ids = ids.masked_fill(lent >= 0, -1);
  split.lent.expert_ids = lent;
  split.owned.may_skip = split.lent.may_skip = true;
  return split;
}

}  // namespace anabranch
