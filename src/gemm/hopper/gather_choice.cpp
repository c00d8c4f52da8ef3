#include "gemm/hopper/gather_choice.h"

namespace anabranch::hopper {

// A row is copied once, and read by its index for every tile of columns. Each bound is about where on an H200 the one
// began to cost what the other does, of rows that have 8 experts.
bool gains_by_index(GatheredRows rows, int64_t n, int64_t k) {
  switch (rows) {
    case GatheredRows::kForwardX:
      return n <= 4096;
    case GatheredRows::kBackwardDy:  // one copy for dgrad and wgrad
      return k <= 512;
    case GatheredRows::kWgradX:
      return n <= 1536;
  }
  return false;
}

}  // namespace anabranch::hopper
