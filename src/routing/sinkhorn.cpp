#include "routing/sinkhorn.h"

#include <ATen/ATen.h>

#include <limits>

namespace anabranch {

torch::Tensor sinkhorn_bias(const torch::Tensor& logits, const torch::Tensor& left_out) {
  auto bias = at::zeros({logits.size(1)}, logits.options());
  if (logits.size(0) == 0) return bias;
  auto none = logits.isfinite().all(1).logical_not();
  if (left_out.defined()) none = none.logical_or(left_out);
  none = none.unsqueeze(1);  // [T, 1]
  const auto known = logits.masked_fill(none, 0);
  for (int64_t round = 0; round < kSinkhornRounds; ++round) {
    const auto of_row = (known + bias).logsumexp(1, /*keepdim=*/true).neg();
    const auto scaled = known + of_row.masked_fill(none, -std::numeric_limits<double>::infinity());
    bias = scaled.logsumexp(0).neg().nan_to_num(0, 0, 0);  // infinite where all is left out
    bias = bias - bias.mean();
  }
  return bias;
}

}  // namespace anabranch
