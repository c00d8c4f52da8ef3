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

// The shapes of the tilings: see Tiling. What is gathered cannot be shared.

template <Operation kOperation, Share kShare, Epilogue kEpilogue = Epilogue::kStore,
          Gathered kGathered = Gathered::kNone>
using Pingpong =
    Shape<kOperation, 2, 128, true, 6, 2, kShare, kEpilogue, /*kGlu=*/false, kGathered>;
template <Operation kOperation, Epilogue kEpilogue = Epilogue::kStore, bool kGlu = false,
          Share kShare = Share::kB, Gathered kGathered = Gathered::kNone>
using Cooperative = Shape<kOperation, 1, 256, false, 4, 2, kShare, kEpilogue, kGlu, kGathered>;

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

template <typename scalar_t, Operation kOperation, Gathered kGathered,
          Epilogue kEpilogue = Epilogue::kStore>
void launch_gathering(Tiling tiling, const Maps& maps, const Problem& problem,
                      cudaStream_t stream) {
  // What is shared comes from the second cache once for two, what is gathered for each: tall tiles gather less of b.
  constexpr bool kTall = kGathered == Gathered::kB;
  constexpr Share kShare = kTall ? Share::kA : Share::kB;
  using Wide = std::conditional_t<
      kTall, Shape<kOperation, 2, 128, false, 4, 2, kShare, kEpilogue, false, kGathered>,
      Cooperative<kOperation, kEpilogue, false, kShare, kGathered>>;
  switch (tiling) {
    case Tiling::kPingpong:
    case Tiling::kPingpongSharingB:
      return launch<scalar_t, Pingpong<kOperation, kShare, kEpilogue, kGathered>>(maps, problem,
                                                                                  stream);
    case Tiling::kCooperative:
    case Tiling::kCooperativeAlone:
      return launch<scalar_t, Wide>(maps, problem, stream);
  }
}

/// With an activation, of which `kGathered` are the rows.
template <typename scalar_t, bool kGlu, Gathered kGathered>
void launch_with_activation(Operation operation, Tiling tiling, const Maps& maps,
                            const Problem& problem, cudaStream_t stream) {
  constexpr Share kNarrowShare = kGathered == Gathered::kA ? Share::kB : Share::kA;
  using Forward = Shape<Operation::kForward, 2, 128, true, 6, 2, kNarrowShare, Epilogue::kActivate,
                        kGlu, kGathered>;
  using WideForward =
      Cooperative<Operation::kForward, Epilogue::kActivate, kGlu, Share::kB, kGathered>;
  // Hidden values take more staging boxes, and stages make room for them.
  using Backward = Shape<Operation::kDgrad, 2, 128, true, kGlu ? 4 : 5, kGlu ? 5 : 3, kNarrowShare,
                         Epilogue::kActivateBackward, kGlu, kGathered>;
  using WideBackward = Shape<Operation::kDgrad, 1, 256, false, 3, kGlu ? 5 : 3, Share::kB,
                             Epilogue::kActivateBackward, kGlu, kGathered>;
  const bool wide = tiling == Tiling::kCooperative;
  if (operation == Operation::kForward) {
    return wide ? launch<scalar_t, WideForward>(maps, problem, stream)
                : launch<scalar_t, Forward>(maps, problem, stream);
  }
  return wide ? launch<scalar_t, WideBackward>(maps, problem, stream)
              : launch<scalar_t, Backward>(maps, problem, stream);
}

template <typename scalar_t, bool kGlu>
void launch_with_activation(const Task& task, Tiling tiling, const Maps& maps,
                            const Problem& problem, cudaStream_t stream) {
  const auto launch_it = task.gathered == Gathered::kA
                             ? launch_with_activation<scalar_t, kGlu, Gathered::kA>
                             : launch_with_activation<scalar_t, kGlu, Gathered::kNone>;
  launch_it(task.operation, tiling, maps, problem, stream);
}

template <typename scalar_t, Epilogue kEpilogue>
void launch_wgrad(Gathered gathered, Tiling tiling, const Maps& maps, const Problem& problem,
                  cudaStream_t stream) {
  constexpr Operation kWgrad = Operation::kWgrad;
  switch (gathered) {
    case Gathered::kNone:
      return launch<scalar_t, kWgrad, kEpilogue>(tiling, maps, problem, stream);
    case Gathered::kA:
      return launch_gathering<scalar_t, kWgrad, Gathered::kA, kEpilogue>(tiling, maps, problem,
                                                                         stream);
    case Gathered::kB:
      return launch_gathering<scalar_t, kWgrad, Gathered::kB, kEpilogue>(tiling, maps, problem,
                                                                         stream);
  }
}

template <typename scalar_t>
void launch(const Task& task, Tiling tiling, const Maps& maps, const Problem& problem,
            cudaStream_t stream) {
  if (task.epilogue == Epilogue::kActivate || task.epilogue == Epilogue::kActivateBackward) {
    return task.glu ? launch_with_activation<scalar_t, true>(task, tiling, maps, problem, stream)
                    : launch_with_activation<scalar_t, false>(task, tiling, maps, problem, stream);
  }
  switch (task.operation) {
    case Operation::kForward:
      return task.gathered == Gathered::kA
                 ? launch_gathering<scalar_t, Operation::kForward, Gathered::kA>(tiling, maps,
                                                                                 problem, stream)
                 : launch<scalar_t, Operation::kForward>(tiling, maps, problem, stream);
    case Operation::kDgrad:
      return launch<scalar_t, Operation::kDgrad>(tiling, maps, problem, stream);
    case Operation::kWgrad:
      return task.epilogue == Epilogue::kAccumulate
                 ? launch_wgrad<scalar_t, Epilogue::kAccumulate>(task.gathered, tiling, maps,
                                                                 problem, stream)
                 : launch_wgrad<scalar_t, Epilogue::kStore>(task.gathered, tiling, maps, problem,
                                                            stream);
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
