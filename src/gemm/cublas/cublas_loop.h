#pragma once

#include <anabranch/grouped_gemm.h>

namespace anabranch {

constexpr int kMostCublasStreams = 8;

/// cuBLASLt expert by expert over 1 to 8 side streams, which fork from the current stream and
/// join it; largest expert first. Engines of one device share the streams.
std::shared_ptr<GroupedGemmEngine> make_cublas_loop_engine(torch::Device device, int streams);

}  // namespace anabranch
