#include "gemm/hopper/kernel.cuh"
#include "gemm/hopper/launch.h"
#include "kernels/cuda/device.cuh"
#include "support/cuda_check.h"

namespace anabranch::hopper {
namespace {

template <typename scalar_t, typename shape>
void launch(const Maps& maps, const Problem& problem, cudaStream_t stream) {
  const auto kernel = grouped_gemm_kernel<scalar_t, shape>;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  shape::kSharedBytes),
             "cudaFuncSetAttribute");
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {kClusterSize, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = cuda::grid_size(cuda::multiprocessors() / kClusterSize * kClusterSize);
  config.blockDim = kThreads;
  config.dynamicSmemBytes = shape::kSharedBytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  check_cuda(cudaLaunchKernelEx(&config, kernel, maps, problem), "cudaLaunchKernelEx");
}

/// Tiles of 128 x 128, each warpgroup's epilogue in the shadow of the other's products.
template <Operation kOperation, Share kShare, Epilogue kEpilogue = Epilogue::kStore>
using Alternating = Shape<kOperation, 2, 128, true, 6, 2, kShare, kEpilogue>;
/// Tiles of 128 x 256: fewest bytes into shared memory, and so least power, which is what bounds a chip
/// that multiplies for long.
template <Operation kOperation, Epilogue kEpilogue = Epilogue::kStore, bool kGlu = false>
using Wide = Shape<kOperation, 1, 256, false, 4, 2, Share::kB, kEpilogue, kGlu>;

constexpr int kLongSum = 4096;

/// Whether tiles twice as wide as those of shape `narrow` would be full.
template <typename narrow>
bool fills_wide_tiles(const Problem& problem) {
  constexpr int kManyRows = 512;    // of an expert
  constexpr int kManyColumns = 15;  // of narrow tiles: half a wide tile too many is little
  const int columns = (problem.n + narrow::kTileColumns - 1) / narrow::kTileColumns;
  int64_t rows = 0;
  for (int g = 0; g < problem.groups; ++g) {
    rows += problem.group[g].rows;
  }
  return (columns % 2 == 0 || columns >= kManyColumns) &&
         (rows >= int64_t{kManyRows} * problem.groups || problem.k >= kLongSum);
}

template <typename scalar_t, Operation kOperation, Epilogue kEpilogue = Epilogue::kStore>
void launch(const Maps& maps, const Problem& problem, cudaStream_t stream) {
  using Narrow = Alternating<kOperation, Share::kA, kEpilogue>;
  if (fills_wide_tiles<Narrow>(problem)) {
    launch<scalar_t, Wide<kOperation, kEpilogue>>(maps, problem, stream);
  } else if ((problem.n + 127) / 128 % 2 == 0) {
    launch<scalar_t, Narrow>(maps, problem, stream);
  } else {
    launch<scalar_t, Alternating<kOperation, Share::kB, kEpilogue>>(maps, problem, stream);
  }
}

template <typename scalar_t, bool kGlu>
void launch_with_activation(Operation operation, const Maps& maps, const Problem& problem,
                            cudaStream_t stream) {
  using Forward =
      Shape<Operation::kForward, 2, 128, true, 6, 2, Share::kA, Epilogue::kActivate, kGlu>;
  using WideForward = Wide<Operation::kForward, Epilogue::kActivate, kGlu>;
  using Backward = Shape<Operation::kDgrad, 2, 128, true, kGlu ? 4 : 5, kGlu ? 5 : 3, Share::kA,
                         Epilogue::kActivateBackward, kGlu>;
  using WideBackward = Shape<Operation::kDgrad, 1, 256, false, 3, kGlu ? 5 : 3, Share::kB,
                             Epilogue::kActivateBackward, kGlu>;
  if (operation == Operation::kForward) {
    if (fills_wide_tiles<Forward>(problem)) {
      launch<scalar_t, WideForward>(maps, problem, stream);
    } else {
      launch<scalar_t, Forward>(maps, problem, stream);
    }
  } else if (problem.k >= kLongSum && fills_wide_tiles<Backward>(problem)) {
    // The epilogue takes long: of a short sum it is better in the shadow of products.
    launch<scalar_t, WideBackward>(maps, problem, stream);
  } else {
    launch<scalar_t, Backward>(maps, problem, stream);
  }
}

template <typename scalar_t>
void launch(const Task& task, const Maps& maps, const Problem& problem, cudaStream_t stream) {
  if (task.epilogue == Epilogue::kAccumulate) {
    return launch<scalar_t, Operation::kWgrad, Epilogue::kAccumulate>(maps, problem, stream);
  }
  if (task.epilogue != Epilogue::kStore) {
    return task.glu
               ? launch_with_activation<scalar_t, true>(task.operation, maps, problem, stream)
               : launch_with_activation<scalar_t, false>(task.operation, maps, problem, stream);
  }
  switch (task.operation) {
    case Operation::kForward:
      return launch<scalar_t, Operation::kForward>(maps, problem, stream);
    case Operation::kDgrad:
      return launch<scalar_t, Operation::kDgrad>(maps, problem, stream);
    case Operation::kWgrad:
      return launch<scalar_t, Operation::kWgrad>(maps, problem, stream);
  }
}

}  // namespace

void launch_grouped_gemm(const Task& task, const Maps& maps, const Problem& problem,
                         cudaStream_t stream) {
  if (task.element == Element::kBfloat16) {
    launch<__nv_bfloat16>(task, maps, problem, stream);
  } else {
    launch<__half>(task, maps, problem, stream);
  }
}

}  // namespace anabranch::hopper
