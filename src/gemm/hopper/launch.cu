#include <atomic>

#include "gemm/hopper/kernel.cuh"
#include "gemm/hopper/launch.h"
#include "gemm/hopper/tile_choice.h"
#include "kernels/cuda/device.cuh"
#include "support/cuda/check.h"

namespace anabranch::hopper {
namespace {

/// Lets a kernel take as much shared memory as a shape needs, once for each device.
template <typename scalar_t, typename shape>
void allow_shared_memory() {
  static std::atomic<uint64_t> allowed = 0;  // a bit for each of the first 64
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if ((allowed.load(std::memory_order_relaxed) & bit) != 0) return;
  check_cuda(cudaFuncSetAttribute(grouped_gemm_kernel<scalar_t, shape>,
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, shape::kSharedBytes),
             "cudaFuncSetAttribute");
  allowed.fetch_or(bit, std::memory_order_relaxed);
}

template <typename scalar_t, typename shape>
void launch(const Maps& maps, const Problem& problem, cudaStream_t stream) {
  const auto kernel = grouped_gemm_kernel<scalar_t, shape>;
  allow_shared_memory<scalar_t, shape>();
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {shape::kClusterSize, 1, 1};
  cudaLaunchConfig_t config = {};
  constexpr int kSize = shape::kClusterSize;
  config.gridDim = cuda::grid_size(cuda::multiprocessors() / kSize * kSize);
  config.blockDim = kThreads;
  config.dynamicSmemBytes = shape::kSharedBytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  check_cuda(cudaLaunchKernelEx(&config, kernel, maps, problem), "cudaLaunchKernelEx");
}

// The shapes of the tilings: see Tiling.

template <Operation kOperation, Share kShare, Epilogue kEpilogue = Epilogue::kStore>
using Pingpong = Shape<kOperation, 2, 128, true, 6, 2, kShare, kEpilogue>;
template <Operation kOperation, Epilogue kEpilogue = Epilogue::kStore, bool kGlu = false,
          Share kShare = Share::kB>
using Cooperative = Shape<kOperation, 1, 256, false, 4, 2, kShare, kEpilogue, kGlu>;

template <typename scalar_t, Operation kOperation, Epilogue kEpilogue = Epilogue::kStore>
void launch(Tiling tiling, const Maps& maps, const Problem& problem, cudaStream_t stream) {
  switch (tiling) {
    case Tiling::kPingpong:
      return launch<scalar_t, Pingpong<kOperation, Share::kA, kEpilogue>>(maps, problem, stream);
    case Tiling::kPingpongSharingB:
      return launch<scalar_t, Pingpong<kOperation, Share::kB, kEpilogue>>(maps, problem, stream);
    case Tiling::kCooperative:
      return launch<scalar_t, Cooperative<kOperation, kEpilogue>>(maps, problem, stream);
    case Tiling::kCooperativeAlone:
      if constexpr (kOperation != Operation::kWgrad) {
        return launch<scalar_t, Cooperative<kOperation, kEpilogue, false, Share::kNone>>(
            maps, problem, stream);
      }
  }
}

template <typename scalar_t, bool kGlu>
void launch_with_activation(Operation operation, Tiling tiling, const Maps& maps,
                            const Problem& problem, cudaStream_t stream) {
  using Forward =
      Shape<Operation::kForward, 2, 128, true, 6, 2, Share::kA, Epilogue::kActivate, kGlu>;
  using WideForward = Cooperative<Operation::kForward, Epilogue::kActivate, kGlu>;
  // Hidden values take more staging boxes, and stages make room for them.
  using Backward = Shape<Operation::kDgrad, 2, 128, true, kGlu ? 4 : 5, kGlu ? 5 : 3, Share::kA,
                         Epilogue::kActivateBackward, kGlu>;
  using WideBackward = Shape<Operation::kDgrad, 1, 256, false, 3, kGlu ? 5 : 3, Share::kB,
                             Epilogue::kActivateBackward, kGlu>;
  const bool wide = tiling == Tiling::kCooperative;
  if (operation == Operation::kForward) {
    return wide ? launch<scalar_t, WideForward>(maps, problem, stream)
                : launch<scalar_t, Forward>(maps, problem, stream);
  }
  return wide ? launch<scalar_t, WideBackward>(maps, problem, stream)
              : launch<scalar_t, Backward>(maps, problem, stream);
}

template <typename scalar_t>
void launch(const Task& task, Tiling tiling, const Maps& maps, const Problem& problem,
            cudaStream_t stream) {
  if (task.epilogue == Epilogue::kAccumulate) {
    return launch<scalar_t, Operation::kWgrad, Epilogue::kAccumulate>(tiling, maps, problem,
                                                                      stream);
  }
  if (task.epilogue != Epilogue::kStore) {
    const auto launch_activated =
        task.glu ? launch_with_activation<scalar_t, true> : launch_with_activation<scalar_t, false>;
    return launch_activated(task.operation, tiling, maps, problem, stream);
  }
  switch (task.operation) {
    case Operation::kForward:
      return launch<scalar_t, Operation::kForward>(tiling, maps, problem, stream);
    case Operation::kDgrad:
      return launch<scalar_t, Operation::kDgrad>(tiling, maps, problem, stream);
    case Operation::kWgrad:
      return launch<scalar_t, Operation::kWgrad>(tiling, maps, problem, stream);
  }
}

}  // namespace

void launch_grouped_gemm(const Task& task, const Maps& maps, const Problem& problem, int64_t rows,
                         cudaStream_t stream) {
  const Tiling tiling = choose_tiling(task, {problem.experts, rows, problem.n, problem.k});
  if (task.element == Element::kBfloat16) {
    launch<__nv_bfloat16>(task, tiling, maps, problem, stream);
  } else {
    launch<__half>(task, tiling, maps, problem, stream);
  }
}

}  // namespace anabranch::hopper
