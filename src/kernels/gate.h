#pragma once

#include <torch/types.h>

#include <array>

#include "kernels/kernels.h"

namespace anabranch {

/// What the gate's product takes its operands apart with.
class GateKernels : public Kernels<GateKernels> {
 public:
  static const GateKernels& cpu();
  static const GateKernels& cuda();

  /// x fp32 [m, n] in bf16 numbers: part 0 is x rounded, each further one the rounded rest, so that
  /// x = Σ parts 0..2. Place s of the result holds part `parts[s]`: [3, m, n], or [m, 3, n] if
  /// `side_by_side`.
  virtual torch::Tensor split(const torch::Tensor& x, const std::array<int, 3>& parts,
                              bool side_by_side) const = 0;
};

}  // namespace anabranch
