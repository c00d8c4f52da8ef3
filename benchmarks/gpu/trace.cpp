#include "gpu/trace.h"

#include <torch/csrc/autograd/profiler_kineto.h>
#include <torch/cuda.h>

#include <algorithm>
#include <cstdio>
#include <limits>
#include <set>
#include <vector>

namespace anabranch::benchmark {

Trace trace(const std::function<void()>& step) {
  namespace profiler = torch::autograd::profiler;
  const profiler::ProfilerConfig config(torch::profiler::impl::ProfilerState::KINETO);
  const std::set activities = {torch::profiler::impl::ActivityType::CUDA};
  profiler::prepareProfiler(config, activities);
  profiler::enableProfiler(config, activities);
  step();
  torch::cuda::synchronize();
  const auto result = profiler::disableProfiler();
  Trace trace;
  uint64_t first = std::numeric_limits<uint64_t>::max();
  uint64_t last = 0;
  for (const auto& event : result->events()) {
    if (event.deviceType() != c10::DeviceType::CUDA) {
      continue;
    }
    const double us = static_cast<double>(event.durationNs()) / 1e3;
    trace.kernels[event.name()] += us;
    trace.busy += us;
    ++trace.launches;
    first = std::min(first, event.startNs());
    last = std::max(last, event.startNs() + event.durationNs());
  }
  trace.span = last > first ? static_cast<double>(last - first) / 1e3 : 0;
  return trace;
}

void print(const Trace& trace) {
  std::vector<std::pair<double, std::string>> sorted;
  for (const auto& [name, us] : trace.kernels) {
    sorted.emplace_back(us, name);
  }
  std::sort(sorted.rbegin(), sorted.rend());
  std::printf("  %lld launches, %.0f us from the first to the last, %.0f us of them busy\n",
              static_cast<long long>(trace.launches), trace.span, trace.busy);
  for (const auto& [us, name] : sorted) {
    if (us > 0.004 * trace.busy) {
      std::printf("  %9.1f us  %.150s\n", us, name.c_str());
    }
  }
}

}  // namespace anabranch::benchmark
