#include "support/cuda/nvtx_range.h"

#include <nvtx3/nvToolsExt.h>

namespace anabranch {

NvtxRange::NvtxRange(const char* name) { static_cast<void>(nvtxRangePushA(name)); }
NvtxRange::~NvtxRange() { static_cast<void>(nvtxRangePop()); }

}  // namespace anabranch
