#include "metrics/moment.h"

#include <c10/core/impl/VirtualGuardImpl.h>

namespace train_lm {

Moment::Moment(torch::Device device) : time_(std::chrono::steady_clock::now()) {
  if (!device.is_cpu()) {
    event_.emplace(device.type(), c10::EventFlag::BACKEND_DEFAULT);
    event_->record(c10::impl::VirtualGuardImpl(device.type()).getStream(device));
  }
}

void Moment::wait() const {
  if (event_) {
    event_->synchronize();
  }
}

double Moment::seconds_until(const Moment& later) const {
  return event_ ? event_->elapsedTime(*later.event_) / 1e3
                : std::chrono::duration<double>(later.time_ - time_).count();
}

}  // namespace train_lm
