#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>

namespace anabranch::benchmark {

/// What a GPU did in one step, by the profiler: microseconds of each kernel, copy and fill by its name, how
/// many there were, and the time from the first one's start to the last one's end.
struct Trace {
  std::map<std::string, double> kernels;
  int64_t launches = 0;
  double busy = 0;
  double span = 0;
};

Trace trace(const std::function<void()>& step);

/// The span, and the kernels that take longest.
void print(const Trace& trace);

}  // namespace anabranch::benchmark
