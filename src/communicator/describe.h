#pragma once

#include <string>

namespace anabranch {

/// A line each: versions, and what they make possible.
std::string describe_mpi();
std::string describe_nccl();

}  // namespace anabranch
