#pragma once

#include <c10/core/Device.h>
#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <chrono>
#include <optional>

namespace anabranch {

/// A moment of the host or, on a GPU, between what is on the current stream and what comes behind it.
class Moment {
 public:
  /// Now.
  explicit Moment(c10::Device device) : time_(Clock::now()) {
    if (!device.is_cpu()) {
      event_.emplace(device.type(), c10::EventFlag::BACKEND_DEFAULT);
      event_->record(c10::impl::VirtualGuardImpl(device.type()).getStream(device));
    }
  }
  /// Waits until a GPU has come here.
  double seconds_since(const Moment& begin) const {
    if (event_) {
      event_->synchronize();
      return begin.event_->elapsedTime(*event_) / 1000;
    }
    return std::chrono::duration<double>(time_ - begin.time_).count();
  }

 private:
  using Clock = std::chrono::steady_clock;
  Clock::time_point time_;
  std::optional<c10::Event> event_;
};

}  // namespace anabranch
