#include "support/stage_times.h"

#include <utility>

namespace anabranch {
namespace {

/// More than a step has: then those that have ended are summed up.
constexpr size_t kPending = 512;

thread_local StageTimes* current = nullptr;
thread_local std::optional<c10::Device> current_device;

}  // namespace

StageTimes::Measuring::Measuring(StageTimes* times, c10::Device device)
    : former_(std::exchange(current, times)),
      former_device_(std::exchange(current_device, device)) {}

StageTimes::Measuring::~Measuring() {
  current = former_;
  current_device = former_device_;
}

StageTimes::Measured::Measured(const char* name)
    : times_(current), name_(name), device_(current_device) {
  if (times_ != nullptr) begin_.emplace(*device_);
}

StageTimes::Measured::~Measured() {
  if (times_ == nullptr) return;
  try {
    Moment end(*device_);
    if (device_->is_cpu()) {
      times_->add(name_, end.seconds_since(*begin_));
    } else {
      times_->add({name_, std::move(*begin_), std::move(end)});
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
    seconds_[name] += end.seconds_since(begin);
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
