#pragma once

#include <ATen/Parallel.h>
#include <c10/core/Device.h>

#include <algorithm>
#include <cstdint>

namespace anabranch {

/// In how many parts experts are worked through at most. Only one part's intermediate values are alive at a
/// time, in memory that is warm from the part before; many threads want larger parts to share. On a GPU
/// every launch counts, and an engine balances itself over all experts: one part.
inline int64_t most_parts(c10::Device device) {
  return device.is_cpu() ? std::clamp(32 / at::get_num_threads(), 1, 8) : 1;
}

}  // namespace anabranch
