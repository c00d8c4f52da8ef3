#include "support/devices.h"

#include <ATen/Context.h>

#include <cstdlib>
#include <optional>
#include <stdexcept>

#include "kernels/rows.h"

namespace anabranch::test {
namespace {

bool built_with_cuda() {
  try {
    RowKernels::cuda();
    return true;
  } catch (const std::runtime_error&) {
    return false;
  }
}

/// Number of this process among those of its host, as mpirun's children know it before MPI does.
int local_rank() {
  const char* value = std::getenv("OMPI_COMM_WORLD_LOCAL_RANK");
  return value == nullptr ? 0 : std::atoi(value);
}

std::optional<torch::Device> chosen;

}  // namespace

bool have_cuda() { return at::hasCUDA() && at::getNumGPUs() > 0 && built_with_cuda(); }

void set_device(const std::string& name) {
  chosen = torch::Device(name);
  if (chosen->is_cuda() && have_cuda()) {
    chosen =
        torch::Device(torch::kCUDA, static_cast<c10::DeviceIndex>(local_rank() % at::getNumGPUs()));
  }
}

torch::Device device() { return chosen.value_or(torch::Device(torch::kCPU)); }

torch::Tensor on_device(const torch::Tensor& tensor) {
  return tensor.defined() ? tensor.to(device()) : tensor;
}

std::vector<torch::Device> devices() {
  if (chosen.has_value()) {
    return {*chosen};
  }
  std::vector<torch::Device> found = {torch::Device(torch::kCPU)};
  if (have_cuda()) {
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
