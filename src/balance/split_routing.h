#pragma once

#include <anabranch/exchange.h>

#include <optional>
#include <vector>

#include "balance/loads.h"

namespace anabranch {

/// A step's routing in two: what travels to the owners of its experts, and what goes to borrowers. The weights are
/// those of the whole, of which each assignment has one in one of them.
struct SplitRouting {
  Routing owned;
  Routing lent;  ///< ids are places of `exchange`: a rank's are the loans that it borrows
  /// To the borrowers. Of this rank alone where every rank computes its own tokens, and none where it then has
  /// borrowed nothing.
  std::optional<Exchange> exchange;
};
SplitRouting split_routing(const Routing& routing, const std::vector<Loan>& loans,
                           const Exchange& exchange);

}  // namespace anabranch
