#pragma once

#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <exception>
#include <optional>

namespace anabranch {

/// A stream beside the caller's, which is the one that is current at construction. Where a device has
/// no streams, all is done in order.
class SideStream {
 public:
  explicit SideStream(c10::Device device) {
    if (device.is_cuda()) {
      const c10::impl::VirtualGuardImpl backend(device.type());
      callers_ = backend.getStream(device);
      side_ = backend.getStreamFromGlobalPool(device, /*isHighPriority=*/true);
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

  /// `work` is given to the side, behind all that the caller's stream has been given.
  template <typename work_t>
  void run(work_t&& work) {
    if (side_.has_value()) {
      c10::Event given(callers_->device_type());
      given.record(*callers_);
      given.block(*side_);
    }
    const c10::OptionalStreamGuard guard(side_);
    work();
  }

  /// What the caller's stream is given from now on comes behind all that the side has been given.
  void join() { wait(mark()); }

  /// What the side has been given so far.
  using Mark = std::optional<c10::Event>;
  Mark mark() const {
    Mark done;
    if (side_.has_value()) {
      done.emplace(side_->device_type());
      done->record(*side_);
    }
    return done;
  }
  /// `join`, but for what was given before the mark.
  void wait(const Mark& mark) {
    if (mark.has_value()) {
      mark->block(*callers_);
    }
  }

 private:
  std::optional<c10::Stream> callers_;
  std::optional<c10::Stream> side_;
};

}  // namespace anabranch
