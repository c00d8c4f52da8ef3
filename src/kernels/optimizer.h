#pragma once

#include <torch/types.h>

#include "kernels/kernels.h"

namespace anabranch {

/// What AdamW reads and writes of one parameter: contiguous tensors of equal size.
struct AdamWTensors {
  torch::Tensor master;    ///< fp32 or fp64
  torch::Tensor gradient;  ///< of the master's type
  torch::Tensor mean;    ///< of the master's type, or bf16 beside fp32: then rounded stochastically
  torch::Tensor square;  ///< of the mean's type
  torch::Tensor rounded;  ///< of 16 bits: becomes the master, rounded; may be undefined
};

struct AdamWFactors {
  double learning_rate;
  double beta1;
  double beta2;
  double epsilon;
  double decay;         ///< the master is multiplied by 1 − learning_rate · decay first
  uint64_t noise_seed;  ///< of the stochastic rounding of this parameter, in all its steps
  int64_t first_noise;  ///< the first element's number there, whichever rank holds it
};

/// What optimizers do with large tensors.
class OptimizerKernels : public Kernels<OptimizerKernels> {
 public:
  static const OptimizerKernels& cpu();
  static const OptimizerKernels& cuda();

  /// One step for gradient · `scale` [] fp64, number `steps` [] int64 counted from 1, both on the
  /// tensors' device, for whose values the host does not wait. A scale that is not finite: nothing
  /// changes.
  virtual void adamw(const AdamWTensors& tensors, const AdamWFactors& factors,
                     const torch::Tensor& scale, const torch::Tensor& steps) const = 0;

  /// [] fp64: Σ x², summed in fp64 in a fixed order.
  virtual torch::Tensor sum_of_squares(const torch::Tensor& x) const = 0;
};

}  // namespace anabranch
