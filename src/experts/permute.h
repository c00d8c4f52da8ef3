#pragma once

#include <anabranch/exchange.h>

#include "kernels/csr.h"

namespace anabranch {

/// Received rows [R, h] into expert-major order [P, h].
torch::Tensor permute(const torch::Tensor& rows, const ExchangePlan& plan);

/// P rows, row p being rows[index[p]]; rows[p] where the index is undefined.
struct IndexedRows {
  torch::Tensor rows;
  torch::Tensor index;
  Csr places = {};  ///< the p of each of `rows`, where that is known
};
/// permute(rows, plan), to be gathered where it is read.
inline IndexedRows permuted(const torch::Tensor& rows, const ExchangePlan& plan) {
  return {rows, plan.assignment_rows,
          plan.chunks.empty() ? Csr{plan.row_offsets, plan.row_assignments} : Csr()};
}

/// Expert-major rows [P, h] back into received rows [R, h]: each the sum of its assignments', weighted
/// by `weights` [P] where defined. Without weights the adjoint of permute.
torch::Tensor unpermute(const torch::Tensor& assignments, const torch::Tensor& weights,
                        const ExchangePlan& plan);
/// Of these the rows that go back with a chunk of the plan.
torch::Tensor unpermute(const torch::Tensor& assignments, const torch::Tensor& weights,
                        const ExchangePlan& plan, int64_t chunk);

}  // namespace anabranch
