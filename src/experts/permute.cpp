#include "experts/permute.h"

#include "kernels/rows.h"

namespace anabranch {

torch::Tensor permute(const torch::Tensor& rows, const ExchangePlan& plan) {
  return RowKernels::on(rows.device()).scatter_rows(rows, {plan.row_offsets, plan.row_assignments});
}

torch::Tensor unpermute(const torch::Tensor& assignments, const torch::Tensor& weights,
                        const ExchangePlan& plan) {
  return RowKernels::on(assignments.device())
      .sum_rows(assignments, {plan.row_offsets, plan.row_assignments}, weights);
}

}  // namespace anabranch
