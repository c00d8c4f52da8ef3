#pragma once

#include <chrono>
#include <cstdint>
#include <string>

namespace train_lm {

/// What a person at the terminal sees: permanent lines and, below them, a bar. Silent on all ranks
/// but 0.
class Progress {
 public:
  /// `style`: "bar", "lines" (for files: no bar), or "auto" (a bar where standard output is a
  /// terminal; under mpirun it is mpirun that knows, so there lines).
  Progress(bool silent, const std::string& style, int64_t first_step, int64_t last_step);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  /// Writes a permanent line.
  void say(const std::string& line);
  /// Moves the bar to `step`, followed by `text`.
  void show(int64_t step, const std::string& text);
  /// "1:23" until the last step, judged by the steps since construction.
  std::string time_left(int64_t step) const;

 private:
  void clear_bar();

  bool silent_;
  bool bar_;
  bool bar_is_shown_ = false;
  int64_t first_step_;
  int64_t last_step_;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

}  // namespace train_lm
