#pragma once

#include <ATen/record_function.h>

#include <optional>

#include "support/cuda/nvtx_range.h"
#include "support/stage_times.h"

namespace anabranch {

/// Names what a thread does while this lives: a range in torch.profiler's trace and in NVIDIA's
/// profilers, and for StageTimes, where a thread has one. Names are those of docs/architecture.md's
/// story, "anabranch.route" to "anabranch.combine"; the backward of a stage is its name with
/// ".backward". `name` outlives the program's ranges.
class Stage {
 public:
  explicit Stage(const char* name) : range_(at::RecordScope::USER_SCOPE), time_(name) {
    if (range_.isActive()) {
      range_.before(name);  // to NVIDIA's profilers too, under emit_nvtx
    } else {
      nvtx_range_.emplace(name);
    }
  }

 private:
  at::RecordFunction range_;
  std::optional<NvtxRange> nvtx_range_;
  StageTimes::Measured time_;
};

/// What `work` returns, done as the stage of that name.
template <typename Work>
auto stage(const char* name, Work&& work) {
  const Stage named(name);
  return work();
}

}  // namespace anabranch
