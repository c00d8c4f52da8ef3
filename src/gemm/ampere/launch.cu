#include "gemm/ampere/launch.h"

#include <array>
#include <atomic>

#include "gemm/ampere/kernel.cuh"
#include "kernels/cuda/device.cuh"
#include "support/cuda/check.h"

namespace anabranch::ampere {
namespace {

/// CTAs of a kernel that are on the current device at once, whose shared memory it is allowed with the first call.
template <typename scalar_t, typename shape>
int resident_ctas() {
  constexpr int kDevices = 64;  // of which it is remembered
  static std::array<std::atomic<int>, kDevices> known = {};
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  int ctas = device < kDevices ? known[device].load(std::memory_order_relaxed) : 0;
  if (ctas == 0) {
    const auto kernel = grouped_gemm_kernel<scalar_t, shape>;
    check_cuda(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
        "cudaFuncSetAttribute");
    check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&ctas, kernel, kThreads, kSharedBytes),
               "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
    ctas *= cuda::multiprocessors();
    if (device < kDevices) known[device].store(ctas, std::memory_order_relaxed);
  }
  return ctas;
}

template <typename scalar_t, typename shape>
void launch(const Problem& problem, const Source& a, const Source& b, void* c,
            cudaStream_t stream) {
  const Matrices<scalar_t> matrices = {static_cast<const scalar_t*>(a.data),
                                       static_cast<const scalar_t*>(b.data),
                                       static_cast<scalar_t*>(c), a.index, b.index};
  grouped_gemm_kernel<scalar_t, shape>
      <<<resident_ctas<scalar_t, shape>(), kThreads, kSharedBytes, stream>>>(problem, matrices);
  check_launch("grouped_gemm");
}

/// Calls `body` with the shape of a task.
template <typename Body>
void dispatch_shape(const Task& task, const Body& body) {
  switch (task.epilogue) {
    case Epilogue::kStore:
      switch (task.operation) {
        case Operation::kForward:
          return body(Shape<Operation::kForward>());
        case Operation::kDgrad:
          return body(Shape<Operation::kDgrad>());
        case Operation::kWgrad:
          return body(Shape<Operation::kWgrad>());
      }
      return;
    case Epilogue::kAccumulate:
      return body(Shape<Operation::kWgrad, Epilogue::kAccumulate>());
    case Epilogue::kActivate:
      return task.glu ? body(Shape<Operation::kForward, Epilogue::kActivate, true>())
                      : body(Shape<Operation::kForward, Epilogue::kActivate, false>());
    case Epilogue::kActivateBackward:
      return task.glu ? body(Shape<Operation::kDgrad, Epilogue::kActivateBackward, true>())
                      : body(Shape<Operation::kDgrad, Epilogue::kActivateBackward, false>());
  }
}

}  // namespace

void launch_grouped_gemm(const Task& task, const Problem& problem, const Source& a, const Source& b,
                         void* c, cudaStream_t stream) {
  dispatch_shape(task, [&](auto shape) {
    if (task.element == Element::kBfloat16) {
      launch<__nv_bfloat16, decltype(shape)>(problem, a, b, c, stream);
    } else {
      launch<__half, decltype(shape)>(problem, a, b, c, stream);
    }
  });
}

}  // namespace anabranch::ampere
