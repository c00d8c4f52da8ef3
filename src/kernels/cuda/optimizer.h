#pragma once

#include "kernels/cuda/launch.h"

// Launchers of optimizer.cu: see launch.h.

namespace anabranch::cuda {

/// Of `count` elements each. Master and gradient fp32 (fp64), mean and square of `state`: the same or, beside
/// fp32, bf16.
struct AdamWPointers {
  void* master;
  const void* gradient;
  void* mean;
  void* square;
  void* rounded;  ///< of the type `rounded_scalar`; null: none
};

/// As AdamWFactors of kernels/optimizer.h, beside `scale` and `steps` on the device.
struct AdamWNumbers {
  double learning_rate;
  double beta1;
  double beta2;
  double epsilon;
  double decay;
  uint64_t noise_seed;
  int64_t first_noise;
  const double* scale;
  const int64_t* steps;
};

void launch_adamw(Scalar master_scalar, Scalar state_scalar, Scalar rounded_scalar,
                  const AdamWPointers& pointers, int64_t count, const AdamWNumbers& numbers,
                  cudaStream_t stream);

/// Partial sums that `launch_sum_of_squares` makes of that many elements.
int64_t square_partials(int64_t count);

/// `partial` [square_partials(count)]: sums of x².
void launch_sum_of_squares(Scalar scalar, const void* x, int64_t count, double* partial,
                           cudaStream_t stream);

}  // namespace anabranch::cuda
