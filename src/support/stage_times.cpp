#include "support/stage_times.h"

#include <c10/core/impl/VirtualGuardImpl.h>

#include <utility>

namespace anabranch {
namespace {

/// More than a step has: then those that have ended are summed up.
constexpr size_t kPending = 512;

thread_local StageTimes* current = nullptr;
thread_local std::optional<c10::Device> current_device;

c10::Event recorded_now(c10::Device device) {
  c10::Event event(device.type(), c10::EventFlag::BACKEND_DEFAULT);
  event.record(c10::impl::VirtualGuardImpl(device.type()).getStream(device));
  return event;
}

}  // namespace

StageTimes::Measuring::Measuring(StageTimes* times, c10::Device device)
    : former_(std::exchange(current, times)),
      former_device_(std::exchange(current_device, device)) {}

StageTimes::Measuring::~Measuring() {
  current = former_;
  current_device = former_device_;
}

StageTimes::Measured::Measured(const char* name) : times_(current), name_(name) {
  if (times_ == nullptr) return;
  begin_ = std::chrono::steady_clock::now();
  if (!current_device->is_cpu()) event_ = recorded_now(*current_device);
}

StageTimes::Measured::~Measured() {
  if (times_ == nullptr) return;
  try {
    if (event_) {
      times_->add({name_, std::move(*event_), recorded_now(*current_device)});
    } else {
      const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - begin_;
      times_->add(name_, taken.count());
    }
  } catch (const std::exception&) {
    // What failed on the device ends in an error where its results are used.
  }
}

void StageTimes::add(const char* name, double seconds) {
  const std::scoped_lock lock(mutex_);
  seconds_[name] += seconds;
}

void StageTimes::add(OnDevice stage) {
  {
    const std::scoped_lock lock(mutex_);
    on_device_.push_back(std::move(stage));
    if (on_device_.size() < kPending) return;
  }
  seconds();
}

std::map<std::string, double> StageTimes::seconds() {
  const std::scoped_lock lock(mutex_);
  for (const auto& [name, begin, end] : on_device_) {
    end.synchronize();
    seconds_[name] += begin.elapsedTime(end) / 1000;
  }
  on_device_.clear();
  return seconds_;
}

void StageTimes::reset() {
  const std::scoped_lock lock(mutex_);
  on_device_.clear();
  seconds_.clear();
}

}  // namespace anabranch
