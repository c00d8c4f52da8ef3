#pragma once

#include <torch/types.h>

namespace anabranch {

/// Offsets [groups+1] and members [P] of a grouping; members ascend within a group.
struct Csr {
  torch::Tensor offsets;
  torch::Tensor members;
};

}  // namespace anabranch
