#include "metrics/spikes.h"

#include <algorithm>
#include <cmath>

namespace train_lm {

bool SpikeDetector::add(double loss) {
  if (!std::isfinite(loss)) {
    return true;
  }
  if (losses_.size() == kWindow) {
    double mean = 0, variance = 0;
    for (const double earlier : losses_) {
      mean += earlier / kWindow;
    }
    for (const double earlier : losses_) {
      variance += (earlier - mean) * (earlier - mean) / (kWindow - 1);
    }
    const double bound = mean + kDeviations * std::sqrt(variance);
    losses_.pop_front();
    losses_.push_back(std::min(loss, bound));
    return loss > bound;
  }
  losses_.push_back(loss);
  return false;
}

}  // namespace train_lm
