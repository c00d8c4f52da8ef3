#pragma once

#include <anabranch/grouped_gemm.h>
#include <torch/types.h>

#include "kernels/kernels.h"

namespace anabranch {

/// Where the backward of the activation writes.
struct ActivationGradient {
  torch::Tensor dhidden;   ///< [P, n or 2n], scaled by the weight; may be hidden itself
  torch::Tensor dweights;  ///< [P] in fp32 (fp64): ⟨dactivated, activation(hidden)⟩
};

/// Between the two projections of an expert.
class ActivationKernels : public Kernels<ActivationKernels> {
 public:
  static const ActivationKernels& cpu();
  static const ActivationKernels& cuda();

  /// hidden → [P, n].
  virtual torch::Tensor activate(const torch::Tensor& hidden,
                                 const HiddenActivation& activation) const = 0;
  /// `dactivated` [P, n] is the gradient at the activation before the routing weight is applied, and
  /// becomes weight · activation(hidden). `weights` [P] undefined means 1.
  virtual void activate_backward(torch::Tensor& dactivated, const torch::Tensor& hidden,
                                 const torch::Tensor& weights, const HiddenActivation& activation,
                                 const ActivationGradient& gradient) const = 0;
};

}  // namespace anabranch
