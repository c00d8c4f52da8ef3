#pragma once

#include "kernels/cuda/device.cuh"

namespace anabranch::cuda {

/// A number in bf16 parts: see GateKernels::split.
struct Bf16Parts {
  __nv_bfloat16 part[3];

  __device__ explicit Bf16Parts(float value) {
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      part[i] = __float2bfloat16_rn(value);
      // By name, or it would be one instruction with the product that `value` may be, and not its rounded rest.
      value = __fsub_rn(value, __bfloat162float(part[i]));
    }
  }
  __device__ __nv_bfloat16 operator[](int i) const {
    return i == 0 ? part[0] : i == 1 ? part[1] : part[2];
  }
};

/// A number given as three parts, `step` elements from one to the next: see GateKernels::sum_parts.
template <typename value_t>
__device__ value_t sum_of_parts(const value_t* first, int64_t step) {
  return first[0] + first[step] + first[2 * step];
}

/// Which part goes to which place.
struct Places {
  int part[4];
};

}  // namespace anabranch::cuda
