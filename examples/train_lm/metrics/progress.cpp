#include "metrics/progress.h"

#include <c10/util/StringUtil.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <iostream>

namespace train_lm {
namespace {

constexpr int64_t kBarWidth = 24;

/// mpirun gives its processes a terminal of no size, wherever their output goes in the end.
bool is_terminal_with_a_size() {
  winsize size = {};
  return isatty(STDOUT_FILENO) != 0 && ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 &&
         size.ws_col > 0;
}

}  // namespace

Progress::Progress(bool silent, const std::string& style, int64_t first_step, int64_t last_step)
    : silent_(silent),
      bar_(style == "bar" || (style == "auto" && is_terminal_with_a_size())),
      first_step_(first_step),
      last_step_(last_step) {}

Progress::~Progress() { clear_bar(); }

void Progress::clear_bar() {
  if (bar_is_shown_) {
    std::cout << "\r\x1b[K" << std::flush;
    bar_is_shown_ = false;
  }
}

void Progress::say(const std::string& line) {
  if (!silent_) {
    clear_bar();
    std::cout << line << std::endl;
  }
}

void Progress::show(int64_t step, const std::string& text) {
  if (silent_ || !bar_) {
    return;
  }
  const int64_t filled = kBarWidth * step / std::max<int64_t>(last_step_, 1);
  const std::string bar = std::string(static_cast<size_t>(filled), '#') +
                          std::string(static_cast<size_t>(kBarWidth - filled), '.');
  std::cout << "\r\x1b[K[" << bar << "] " << step << '/' << last_step_ << "  " << text
            << std::flush;
  bar_is_shown_ = true;
}

std::string Progress::time_left(int64_t step) const {
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start_;
  const auto done = static_cast<double>(std::max<int64_t>(step - first_step_, 1));
  const auto seconds =
      static_cast<int64_t>(elapsed.count() / done * static_cast<double>(last_step_ - step));
  const std::string rest = std::to_string(seconds % 60);
  return c10::str(seconds / 60, rest.size() < 2 ? ":0" : ":", rest);
}

}  // namespace train_lm
