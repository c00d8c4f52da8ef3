#pragma once

#include <torch/types.h>

#include <string>
#include <vector>

namespace anabranch::test {

/// Where a suite's tensors live: --device, the CPU by default. With several GPUs each rank of a host
/// has its own, as far as they go.
torch::Device device();
/// `tensor` there; undefined stays undefined.
torch::Tensor on_device(const torch::Tensor& tensor);

/// What a suite parametrised by device runs on: `device()` where --device was given, otherwise the
/// CPU, and CUDA where this build and machine have it.
std::vector<torch::Device> devices();

/// What main does with --device.
void set_device(const std::string& name);
/// Whether this build and this machine have CUDA.
bool have_cuda();

/// "cpu" or "cuda": a test's suffix.
std::string device_name(torch::Device device);

/// The floating types of the library.
const std::vector<torch::Dtype>& all_dtypes();

}  // namespace anabranch::test
