#pragma once

#include <cuda_runtime_api.h>

#include "gemm/hopper/problem.h"

namespace anabranch::hopper {

enum class Element { kBfloat16, kHalf };

/// What to do, and of which type.
struct Task {
  Operation operation;
  Element element;
  Epilogue epilogue = Epilogue::kStore;
  bool glu = false;  ///< of the epilogue
};

/// The products of `problem` on the current device, in the order of `stream`.
void launch_grouped_gemm(const Task& task, const Maps& maps, const Problem& problem,
                         cudaStream_t stream);

}  // namespace anabranch::hopper
