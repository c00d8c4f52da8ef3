#include "experts/permute.h"

#include <numeric>

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

torch::Tensor unpermute(const torch::Tensor& assignments, const torch::Tensor& weights,
                        const ExchangePlan& plan, int64_t chunk) {
  if (plan.chunks.empty()) {
    return unpermute(assignments, weights, plan);
  }
  const auto rows_of = [&](int64_t number) {
    const auto& rows = plan.chunks[number].return_rows;
    return std::accumulate(rows.begin(), rows.end(), int64_t{0});
  };
  int64_t first = 0;
  for (int64_t before = 0; before < chunk; ++before) {
    first += rows_of(before);
  }
  return RowKernels::on(assignments.device())
      .sum_rows(assignments,
                {plan.row_offsets.narrow(0, first, rows_of(chunk) + 1), plan.row_assignments},
                weights);
}

}  // namespace anabranch
