#pragma once

#include <cstdint>
#include <deque>
#include <string>

namespace train_lm {

/// Tells a loss that leaps above those before it.
class SpikeDetector {
 public:
  static constexpr size_t kWindow = 64;
  static constexpr double kDeviations = 6;

  /// Whether `loss` is more than kDeviations standard deviations above the mean of the last kWindow
  /// losses, or is not finite. Before there are as many, no finite loss is. Later losses
  /// are compared with a spike as if it had been no more than that.
  bool add(double loss);

 private:
  std::deque<double> losses_;
};

}  // namespace train_lm
