#include "support/devices.h"

#include <ATen/Context.h>

#include <stdexcept>

#include "kernels/kernels.h"

namespace anabranch::test {
namespace {

bool built_with_cuda() {
  try {
    cuda_kernels();
    return true;
  } catch (const std::runtime_error&) {
    return false;
  }
}

}  // namespace

std::vector<torch::Device> devices() {
  std::vector<torch::Device> found = {torch::Device(torch::kCPU)};
  if (at::hasCUDA() && at::getNumGPUs() > 0 && built_with_cuda()) {
    found.emplace_back(torch::kCUDA, 0);
  }
  return found;
}

std::string device_name(torch::Device device) {
  return c10::DeviceTypeName(device.type(), /*lower_case=*/true);
}

const std::vector<torch::Dtype>& all_dtypes() {
  static const std::vector<torch::Dtype> dtypes = {torch::kFloat32, torch::kFloat64,
                                                   torch::kBFloat16, torch::kFloat16};
  return dtypes;
}

}  // namespace anabranch::test
