#include "exchange/arrange.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/repeat_interleave.h>
#include <ATen/ops/zeros.h>

#include "support/numbers_on.h"
#include "support/sum.h"

namespace anabranch {

torch::Tensor repeated(const torch::Tensor& values, const torch::Tensor& counts, int64_t total) {
  return values.repeat_interleave(counts, /*dim=*/0, /*output_size=*/total);
}

torch::Tensor rank_of_rows(const std::vector<int64_t>& rows, const torch::TensorOptions& options) {
  const auto ranks = static_cast<int64_t>(rows.size());
  return repeated(at::arange(ranks, options), numbers_on(options.device(), rows), sum(rows));
}

torch::Tensor sent_row_of_assignments(const ExchangePlan& plan) {
  const auto options = plan.send_tokens.options();
  const auto ranks = static_cast<int64_t>(plan.send_rows.size());
  const auto rank = rank_of_rows(plan.send_rows, options);
  // The row of each (token, rank).
  const auto row_of = at::empty({plan.tokens * ranks}, options);
  row_of.scatter_(0, plan.send_tokens * ranks + rank, at::arange(rank.size(0), options));
  // Experts lie by rank, and so do assignments.
  return row_of.index_select(0, plan.send_order.div(plan.top_k, "trunc") * ranks +
                                    rank_of_rows(plan.send_assignments, options));
}

Arranged arrange(const torch::Tensor& part, const torch::Tensor& group, int64_t parts,
                 int64_t groups) {
  Arranged anew;
  anew.from = part.argsort(/*stable=*/true, /*dim=*/0, /*descending=*/false);
  anew.place =
      at::empty_like(anew.from).scatter_(0, anew.from, at::arange(part.size(0), part.options()));
  anew.counts = at::zeros({parts * groups}, part.options())
                    .scatter_add_(0, part * groups + group, at::ones_like(part));
  return anew;
}

}  // namespace anabranch
