#include "experts/permute.h"

#include "kernels/kernels.h"

namespace anabranch {

torch::Tensor permute(const torch::Tensor& rows, const ExchangePlan& plan) {
  return kernels_for(rows.device()).gather_rows(rows, plan.assignment_rows);
}

torch::Tensor unpermute(const torch::Tensor& assignments, const torch::Tensor& weights,
                        const ExchangePlan& plan) {
  return kernels_for(assignments.device())
      .sum_rows(assignments, {plan.row_offsets, plan.row_assignments}, weights);
}

}  // namespace anabranch
