#include "kernels/kernels.h"

#include <ATen/ops/empty.h>

#include "support/check.h"

namespace anabranch {

torch::Tensor Kernels::gather_rows(const torch::Tensor& rows, const torch::Tensor& index) const {
  auto sizes = rows.sizes().vec();
  sizes[0] = index.size(0);
  torch::Tensor out = at::empty(sizes, rows.options());
  gather_rows_into(out, rows, index);
  return out;
}

const Kernels& kernels_for(torch::Device device) {
  check_input(device.is_cpu() || device.is_cuda(), "tensors must be on cpu or cuda, not on ",
              device);
  return device.is_cuda() ? cuda_kernels() : cpu_kernels();
}

}  // namespace anabranch
