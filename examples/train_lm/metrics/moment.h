#pragma once

#include <c10/core/Event.h>
#include <torch/types.h>

#include <chrono>
#include <optional>

namespace train_lm {

/// When the work on a device had come to a place: on a GPU its current stream, on a CPU the host.
class Moment {
 public:
  /// Behind all that the device has been given.
  explicit Moment(torch::Device device);

  void wait() const;
  /// Once both have been waited for.
  double seconds_until(const Moment& later) const;

 private:
  std::chrono::steady_clock::time_point time_;
  std::optional<c10::Event> event_;  // on a GPU
};

}  // namespace train_lm
