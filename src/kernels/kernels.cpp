#include "kernels/kernels.h"

#include "support/check.h"

namespace anabranch {

const Kernels& kernels_for(torch::Device device) {
  check_input(device.is_cpu() || device.is_cuda(), "tensors must be on cpu or cuda, not on ",
              device);
  return device.is_cuda() ? cuda_kernels() : cpu_kernels();
}

}  // namespace anabranch
