#pragma once

#include "kernels/cuda/launch.h"

// Launchers of activation.cu: see launch.h.

namespace anabranch::cuda {

struct ActivationArguments {
  Scalar scalar;
  ActivationKind activation;
  bool glu;
  int64_t rows;
  int64_t width;  ///< n
  double limit;   ///< of what is activated, and of the up part; infinite: none
  double offset;  ///< added to the up part
};

void launch_activate(const ActivationArguments& arguments, const void* hidden, void* activated,
                     cudaStream_t stream);

/// `weights` may be null; `weighted` may be `dactivated`.
void launch_activate_backward(const ActivationArguments& arguments, const void* dactivated,
                              const void* hidden, const void* weights, void* dhidden,
                              void* weighted, void* dweights, cudaStream_t stream);

}  // namespace anabranch::cuda
