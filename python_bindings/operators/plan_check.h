#pragma once

#include <anabranch/exchange.h>
#include <torch/types.h>

namespace anabranch::operators {

// A plan comes from outside: indices that do not fit would be read and written out of bounds. Whether
// they fit is found on the host, once for a plan: on a GPU the host waits for that. A plan that the
// operator `plan` has made, and nobody changed, is known to fit.

/// InputError unless sizes and indices fit together. `list`: the tensors that `plan` was made of.
/// `plan.top_k` of 0: not known, as where only the experts' side is read.
void check_plan(const ExchangePlan& plan, at::TensorList list);

/// Says that `list` is a plan that fits, for as long as nobody writes into its tensors.
void remember_plan(at::TensorList list, int64_t top_k);

}  // namespace anabranch::operators
