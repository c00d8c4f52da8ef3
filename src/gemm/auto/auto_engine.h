#pragma once

#include <anabranch/grouped_gemm.h>

namespace anabranch {

/// The fastest of a GPU's engines for each product.
std::shared_ptr<GroupedGemmEngine> make_auto_engine(torch::Device device);

}  // namespace anabranch
