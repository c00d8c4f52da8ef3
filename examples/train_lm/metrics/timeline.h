#pragma once

#include <torch/types.h>

#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "metrics/moment.h"

namespace train_lm {

/// Where the time of a step goes: what lies between two marks of the one sequence in which a step is
/// computed, forward and backward, counts for the name of the second. On a GPU it is the stream's time.
class Timeline {
 public:
  /// Off, until it is started.
  void start(torch::Device device);
  bool is_on() const { return device_.has_value(); }

  /// The time since the last mark was `name`'s.
  void mark(const char* name);
  /// `x`, marked here as `name`, and where backward has its gradient as `backward_name`.
  torch::Tensor mark(const torch::Tensor& x, const char* name, const char* backward_name);

  /// Off again, once the host has waited for all that was marked.
  void stop();
  /// Of all stages.
  double milliseconds() const;
  /// A table of milliseconds a step for `steps` of them, longest first.
  std::string table(double steps) const;

 private:
  struct Mark {
    const char* name;
    Moment moment;
  };

  std::optional<torch::Device> device_;
  std::mutex mutex_;  // backward runs on another thread
  std::vector<Mark> marks_;
  std::map<std::string, double> milliseconds_;
};

}  // namespace train_lm
