#pragma once

#include <string>

namespace anabranch {

/// What this library was built with and what it finds here, a line each: LibTorch, CUDA and the
/// GPUs, NCCL and MPI with their versions and features. For people to read.
std::string describe_build();

}  // namespace anabranch
