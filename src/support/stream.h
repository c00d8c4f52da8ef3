#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/impl/VirtualGuardImpl.h>

namespace anabranch {

/// Waits until the current stream of the tensor's device has done all that it was given; where there
/// are no streams, nothing.
inline void wait_for_stream(const at::Tensor& tensor) {
  if (!tensor.is_cpu()) {
    c10::impl::VirtualGuardImpl(tensor.device().type()).getStream(tensor.device()).synchronize();
  }
}

}  // namespace anabranch
