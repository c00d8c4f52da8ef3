#pragma once

#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <exception>
#include <optional>

namespace anabranch {

/// A stream beside the caller's: what it is given comes behind all that the caller's stream had been
/// given when the side was made, and before all that it is given after `join`. Where a device has no
/// streams, all is done in order.
class SideStream {
 public:
  explicit SideStream(c10::Device device) {
    if (device.is_cuda()) {
      const c10::impl::VirtualGuardImpl backend(device.type());
      callers_ = backend.getStream(device);
      side_ = backend.getStreamFromGlobalPool(device, /*isHighPriority=*/true);
      order(*callers_, *side_);
    }
  }
  SideStream(const SideStream&) = delete;
  SideStream& operator=(const SideStream&) = delete;
  /// Memory of the caller's is free only when the side has done with it.
  ~SideStream() {
    try {
      join();
    } catch (const std::exception&) {
      // The device has failed: its next user will be told.
    }
  }

  template <typename work_t>
  void run(work_t&& work) {
    const c10::OptionalStreamGuard guard(side_);
    work();
  }

  void join() {
    if (side_.has_value()) {
      order(*side_, *callers_);
    }
  }

 private:
  static void order(const c10::Stream& first, const c10::Stream& then) {
    c10::Event done(first.device_type());
    done.record(first);
    done.block(then);
  }

  std::optional<c10::Stream> callers_;
  std::optional<c10::Stream> side_;
};

}  // namespace anabranch
