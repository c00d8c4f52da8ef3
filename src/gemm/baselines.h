#pragma once

#include <anabranch/grouped_gemm.h>

namespace anabranch {

/// Names of the engines that are here to be compared with, on either device: those that pad, and
/// LibTorch's own. "auto" does not consider them.
std::vector<std::string> baseline_engine_names();

/// One of those, or null.
std::shared_ptr<GroupedGemmEngine> make_baseline_engine(torch::Device device,
                                                        const std::string& name);

}  // namespace anabranch
