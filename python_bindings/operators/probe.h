#pragma once

#include <torch/types.h>

#include "support/stage_times.h"

namespace anabranch::operators {

/// What one layer has done since the last reset.
struct Probe {
  std::mutex mutex;
  int64_t forwards = 0;
  int64_t bytes_sent = 0;      ///< to other ranks, in forward and backward
  int64_t bytes_received = 0;  ///< from other ranks
  int64_t collectives = 0;     ///< of several ranks
  bool timed = false;          ///< whether stages are measured
  StageTimes times;
  torch::Tensor expert_load;  ///< [E] int64 of the last forward; undefined before it
};

/// The probe of that number: `probe` is int64 [1] in host memory, as new_probe makes it. A tensor, so
/// that layers that differ in nothing else share what torch.compile makes. Null for number 0.
std::shared_ptr<Probe> probe_of(const torch::Tensor& probe);

}  // namespace anabranch::operators
