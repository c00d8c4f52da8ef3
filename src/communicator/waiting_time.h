#pragma once

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

/// "5.0 s"
std::string in_seconds(std::chrono::milliseconds duration);

}  // namespace anabranch
