#pragma once

#include <cstdint>
#include <functional>
#include <vector>

// Time and memory of calls on the CPU.

namespace anabranch::benchmark {

/// Milliseconds of each call: medians over rounds in which they take turns.
std::vector<double> milliseconds(const std::vector<std::function<void()>>& calls, int rounds);

/// Most bytes that LibTorch's CPU allocator held during `call`, above what it held before.
int64_t peak_bytes(const std::function<void()>& call);

}  // namespace anabranch::benchmark
