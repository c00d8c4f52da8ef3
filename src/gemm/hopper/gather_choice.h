#pragma once

#include <anabranch/grouped_gemm.h>

#include <cstdint>

// Which rows are read by their index and which are copied first: plain C++, to be planned with on any machine.

namespace anabranch::hopper {

/// Whether those rows of products with weights [experts, n, k] are read by their index sooner than they are copied.
bool gains_by_index(GatheredRows rows, int64_t n, int64_t k);

}  // namespace anabranch::hopper
