#include "kernels/kernels.h"

#include "support/check.h"

namespace anabranch {

bool runs_on_cuda(c10::Device device) {
  check_input(device.is_cpu() || device.is_cuda(), "tensors must be on cpu or cuda, not on ",
              device);
  return device.is_cuda();
}

}  // namespace anabranch
