#pragma once

#include <anabranch/exchange.h>

#include <vector>

namespace anabranch {

/// values[i] as often as counts[i] says, `total` in all.
torch::Tensor repeated(const torch::Tensor& values, const torch::Tensor& counts, int64_t total);

/// [Σ rows]: the rank of each row, where rows lie by rank.
torch::Tensor rank_of_rows(const std::vector<int64_t>& rows, const torch::TensorOptions& options);

/// [A]: the sent row of each assignment in `send_order`, in a plan whose rows lie by (destination, token).
torch::Tensor sent_row_of_assignments(const ExchangePlan& plan);

/// What lay in some order, anew by (part, that order).
struct Arranged {
  torch::Tensor from;    ///< [n] where each lay
  torch::Tensor place;   ///< [n] where each lies now
  torch::Tensor counts;  ///< [parts · groups] of each part and group
};
/// `part` and `group` [n] int64, of each in the order in which they lie.
Arranged arrange(const torch::Tensor& part, const torch::Tensor& group, int64_t parts,
                 int64_t groups);

}  // namespace anabranch
