#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace anabranch::tiles {

/// sums [rows]: those of each row of `dots` [rows, width], see Problem.
void launch_sum_dots(const float* dots, int64_t rows, int64_t width, float* sums,
                     cudaStream_t stream);

}  // namespace anabranch::tiles
