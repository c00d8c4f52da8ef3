#include <ATen/cuda/CUDAContextLight.h>
#include <c10/cuda/CUDAStream.h>
#include <cublas_v2.h>

#include "gemm/auto/measuring.h"
#include "support/cuda/handle.h"

namespace anabranch {
namespace {

CudaEvent make_timed_event() {
  cudaEvent_t event = nullptr;
  check_cuda(cudaEventCreate(&event), "cudaEventCreate");
  return CudaEvent(event);
}

}  // namespace

double gpu_milliseconds(const std::function<void()>& call) {
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const CudaEvent begin = make_timed_event();
  const CudaEvent end = make_timed_event();
  check_cuda(cudaEventRecord(begin, stream), "cudaEventRecord");
  call();
  check_cuda(cudaEventRecord(end, stream), "cudaEventRecord");
  check_cuda(cudaEventSynchronize(end), "cudaEventSynchronize");
  float elapsed = 0;
  check_cuda(cudaEventElapsedTime(&elapsed, begin, end), "cudaEventElapsedTime");
  return elapsed;
}

std::string describe_gpu(torch::Device device) {
  int driver = 0;
  check_cuda(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  std::string text =
      c10::str(at::cuda::getDeviceProperties(device.index())->name, "-driver", driver, "-cublas");
  for (const auto property : {MAJOR_VERSION, MINOR_VERSION, PATCH_LEVEL}) {
    int number = 0;
    check_cublas(cublasGetProperty(property, &number), "cublasGetProperty");
    text += c10::str(property == MAJOR_VERSION ? "" : ".", number);
  }
  return text;
}

}  // namespace anabranch
