#pragma once

#include <c10/core/Device.h>

namespace anabranch {

/// InputError for a device that has no kernels.
bool runs_on_cuda(c10::Device device);

/// What a device computes for a stage: everything but the GEMMs. A stage has one header here, and files
/// of the same name in cpu/ and cuda/.
///
/// Index tensors are int64 unless said otherwise, value tensors fp32, fp64, bf16 or fp16; sums are
/// taken in fp32 (fp64 for fp64) in a fixed order. Arguments are trusted: the stages check them. On a
/// GPU everything runs on the current stream of the arguments' device.
template <typename Stage>
class Kernels {
 public:
  virtual ~Kernels() = default;

  /// Those of a device. Stage::cuda() throws NotBuiltError in a build without CUDA.
  static const Stage& on(c10::Device device) {
    return runs_on_cuda(device) ? Stage::cuda() : Stage::cpu();
  }
};

}  // namespace anabranch
