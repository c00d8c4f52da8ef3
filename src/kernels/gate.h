#pragma once

#include <torch/types.h>

#include <array>

#include "kernels/kernels.h"

namespace anabranch {

/// Which part of a number stands in each place.
using SplitPlaces = std::array<int, 4>;
/// Of the logits' gradient d: its first three places are all of it, for the product with x; the last
/// three, d0, d1, d0, meet w0, w0, w1 of the weight, all of that product that bf16 can hold.
constexpr SplitPlaces kSplitGradient = {2, 0, 1, 0};
/// Of the weight: its last three places are all of it, its first three what the gradient meets.
constexpr SplitPlaces kSplitWeight = {0, 0, 1, 2};

/// What the gate's product takes its operands apart with.
class GateKernels : public Kernels<GateKernels> {
 public:
  static const GateKernels& cpu();
  static const GateKernels& cuda();

  /// x fp32 [m, n] in bf16 numbers: part 0 is x rounded, each further one the rounded rest, so that
  /// x = Σ parts 0..2. Place s of the result holds part `parts[s]`: [4, m, n], or [m, 4, n] if
  /// `side_by_side`.
  virtual torch::Tensor split(const torch::Tensor& x, const SplitPlaces& parts,
                              bool side_by_side) const = 0;
  /// [m, n] fp32: Σ over s of the order Σ over pieces [pieces, 3, m, n], and `rest` [3, m, n] if it is
  /// defined, of place s.
  virtual torch::Tensor sum_split(const torch::Tensor& pieces, const torch::Tensor& rest,
                                  const std::array<int, 3>& order) const = 0;
  /// [m, n] fp32: of `parts` [m, 3, n] the first two's sum and the third, as routing adds logits that it is given so.
  virtual torch::Tensor sum_parts(const torch::Tensor& parts) const = 0;
};

}  // namespace anabranch
