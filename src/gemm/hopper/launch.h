#pragma once

#include <cuda_runtime_api.h>

#include "gemm/hopper/problem.h"
#include "gemm/hopper/task.h"

namespace anabranch::hopper {

/// The products of `problem`, whose experts have `rows` rows together, on the current device, in the
/// order of `stream`.
void launch_grouped_gemm(const Task& task, const Maps& maps, const Problem& problem, int64_t rows,
                         cudaStream_t stream);

/// sums [rows]: those of each row of `dots` [rows, width], see Problem.
void launch_sum_dots(const float* dots, int64_t rows, int64_t width, float* sums,
                     cudaStream_t stream);

}  // namespace anabranch::hopper
