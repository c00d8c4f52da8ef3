#pragma once

#include <anabranch/expert_counts.h>
#include <torch/types.h>

#include "kernels/kernels.h"

namespace anabranch {

/// Biases of experts, whose rows lie expert-major.
class BiasKernels : public Kernels<BiasKernels> {
 public:
  static const BiasKernels& cpu();
  static const BiasKernels& cuda();

  /// rows[p] += bias[expert of p]; bias [experts, m].
  virtual void add_bias(torch::Tensor& rows, const torch::Tensor& bias,
                        const ExpertCounts& counts) const = 0;
  /// [experts, m]: Σ over an expert's rows of weights[p] · rows[p]; weights may be undefined.
  virtual torch::Tensor bias_gradient(const torch::Tensor& rows, const torch::Tensor& weights,
                                      const ExpertCounts& counts) const = 0;
  /// [P] in fp32 (fp64): ⟨rows[p], bias[expert of p]⟩.
  virtual torch::Tensor bias_dot(const torch::Tensor& rows, const torch::Tensor& bias,
                                 const ExpertCounts& counts) const = 0;
};

}  // namespace anabranch
