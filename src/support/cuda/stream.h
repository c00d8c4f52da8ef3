#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/impl/VirtualGuardImpl.h>

namespace anabranch {

/// Waits until the device's current stream has done all that it was given; where there are no streams,
/// nothing.
inline void wait_for_stream(c10::Device device) {
  if (!device.is_cpu()) {
    c10::impl::VirtualGuardImpl(device.type()).getStream(device).synchronize();
  }
}
inline void wait_for_stream(const at::Tensor& tensor) { wait_for_stream(tensor.device()); }

}  // namespace anabranch
