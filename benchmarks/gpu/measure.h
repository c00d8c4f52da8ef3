#pragma once

#include <ATen/cuda/CUDAGraph.h>

#include <functional>
#include <vector>

#include "harness.h"

// Times on the current GPU, by events, and what stands beside them in the results.

namespace anabranch::benchmark {

/// Milliseconds of one call on the GPU: the median of several batches, each timed by events around
/// calls that follow one another, after a warm-up.
double gpu_milliseconds(const std::function<void()>& call);

/// The same for several calls that take turns, so that the GPU's clock is the same for all.
std::vector<double> gpu_milliseconds(const std::vector<std::function<void()>>& calls,
                                     int rounds = 9);

/// Milliseconds of one of so many calls that follow one another, by events around them all.
double batch_milliseconds(const std::function<void()>& call, int calls);

/// Microseconds of host time of one call whose work the host does not wait for.
double host_microseconds(const std::function<void()>& call);

/// A step recorded once, with what was chosen by the one before it, on a stream of its own.
class Replayed {
 public:
  explicit Replayed(const std::function<void()>& step);
  void operator()() { graph_.replay(); }

 private:
  at::cuda::CUDAGraph graph_;
};

/// write_results with the GPU and the versions of its driver, runtime and cuBLAS.
void write_gpu_results(const Arguments& arguments, const Json& results);

}  // namespace anabranch::benchmark
