#pragma once

#include <anabranch/grouped_gemm.h>

namespace anabranch {

/// The fastest of a device's engines for each product; the engine itself where there is one only.
std::shared_ptr<GroupedGemmEngine> make_auto_engine(torch::Device device);

}  // namespace anabranch
