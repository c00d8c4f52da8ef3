#include "communicator/waiting_time.h"

#include <algorithm>
#include <array>
#include <cstdio>

namespace anabranch {
namespace {

/// Whoever waits looks at the clock all the time; longer steps were not this process's own.
constexpr std::chrono::milliseconds kLongestStep(100);

}  // namespace

std::chrono::nanoseconds WaitingTime::so_far() {
  const auto now = Clock::now();
  waited_ += std::min<std::chrono::nanoseconds>(now - last_, kLongestStep);
  last_ = now;
  return waited_;
}

std::string in_seconds(std::chrono::milliseconds duration) {
  std::array<char, 32> text = {};
  std::snprintf(text.data(), text.size(), "%.1f s",
                std::chrono::duration<double>(duration).count());
  return text.data();
}

}  // namespace anabranch
