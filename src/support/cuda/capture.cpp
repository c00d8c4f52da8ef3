#include "support/cuda/capture.h"

#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>

namespace anabranch {

bool is_captured(c10::Device device) {
  if (!device.is_cuda()) {
    return false;
  }
  const c10::cuda::CUDAGuard guard(device);
  return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
}

}  // namespace anabranch
