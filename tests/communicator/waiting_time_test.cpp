#include "communicator/waiting_time.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <csignal>
#include <thread>

namespace anabranch::test {
namespace {

using std::chrono::milliseconds;
using std::chrono::nanoseconds;
using Clock = std::chrono::steady_clock;

constexpr milliseconds kStopped(700);

/// Looks at the clock until the process is known to have been stopped, and says how long it has lived and
/// how long that took.
[[noreturn]] void live(int answers) {
  LivedClock lived;
  const auto begin = Clock::now();
  if (write(answers, "", 1) != 1) {
    _exit(1);
  }
  auto last = begin;
  for (bool stopped = false; !stopped;) {
    lived.advance();
    std::this_thread::sleep_for(milliseconds(1));
    stopped = Clock::now() - last > kStopped / 2;
    last = Clock::now();
  }
  lived.advance();
  const std::array<int64_t, 2> times = {lived.now().count(), nanoseconds(last - begin).count()};
  _exit(write(answers, times.data(), sizeof(times)) == sizeof(times) ? 0 : 1);
}

TEST(LivedClock, StandsStillWhileTheProcessIsStopped) {
  std::array<int, 2> ends = {};
  ASSERT_EQ(pipe(ends.data()), 0);
  const pid_t child = fork();
  if (child == 0) {
    live(ends[1]);
  }
  char begun = 0;
  ASSERT_EQ(read(ends[0], &begun, 1), 1);
  kill(child, SIGSTOP);
  std::this_thread::sleep_for(kStopped);
  kill(child, SIGCONT);
  std::array<int64_t, 2> times = {};
  ASSERT_EQ(read(ends[0], times.data(), sizeof(times)), static_cast<ssize_t>(sizeof(times)));
  waitpid(child, nullptr, 0);
  close(ends[0]);
  close(ends[1]);
  const nanoseconds lived(times[0]);
  const nanoseconds passed(times[1]);
  EXPECT_GE(passed, kStopped / 2);
  EXPECT_GT(lived, nanoseconds(0));
  // The time that it was stopped counts as a moment, of at most 100 ms.
  EXPECT_LE(lived, passed - kStopped / 2 + milliseconds(110));
}

}  // namespace
}  // namespace anabranch::test
