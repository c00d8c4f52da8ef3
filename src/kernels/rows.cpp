#include "kernels/rows.h"

#include <ATen/ops/empty.h>

namespace anabranch {

torch::Tensor RowKernels::gather_rows(const torch::Tensor& rows, const torch::Tensor& index) const {
  auto sizes = rows.sizes().vec();
  sizes[0] = index.size(0);
  torch::Tensor out = at::empty(sizes, rows.options());
  gather_rows_into(out, rows, index);
  return out;
}

}  // namespace anabranch
