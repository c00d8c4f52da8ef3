#pragma once

#include <atomic>
#include <chrono>
#include <string>

namespace anabranch {

/// Time spent waiting, as this process lived it: a stretch in which it was stopped, suspended or
/// without a core counts as a moment, so that nobody is blamed for it.
class WaitingTime {
 public:
  /// Up to now; to be called often.
  std::chrono::nanoseconds so_far();

 private:
  using Clock = std::chrono::steady_clock;
  Clock::time_point last_ = Clock::now();
  std::chrono::nanoseconds waited_{0};
};

/// A clock of the time that this process has lived: it stands still while that is stopped.
class LivedClock {
 public:
  using Time = std::chrono::nanoseconds;
  /// Goes on; to be called often, by one thread.
  void advance() { now_ = lived_.so_far().count(); }
  /// When it was last advanced; for any thread.
  Time now() const { return Time(now_.load()); }

 private:
  WaitingTime lived_;
  std::atomic<Time::rep> now_ = 0;
};

/// "5.0 s"
std::string in_seconds(std::chrono::milliseconds duration);

}  // namespace anabranch
