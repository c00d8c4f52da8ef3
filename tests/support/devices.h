#pragma once

#include <torch/types.h>

#include <string>
#include <vector>

namespace anabranch::test {

/// What a device-parametrised suite runs on: the CPU, and CUDA where this build and machine have it.
std::vector<torch::Device> devices();

/// "cpu" or "cuda": a test's suffix.
std::string device_name(torch::Device device);

/// The floating types of the library.
const std::vector<torch::Dtype>& all_dtypes();

}  // namespace anabranch::test
