#pragma once

#include <anabranch/grouped_gemm.h>

namespace anabranch {

/// Whether there is cuBLAS for the device: on every GPU; nowhere in a build without CUDA, in which the
/// engines cannot be made.
bool runs_cublas(torch::Device device);

constexpr int kMostCublasStreams = 8;

/// cuBLASLt expert by expert over 1 to 8 side streams, which fork from the current stream and
/// join it; largest expert first. Engines of one device share the streams.
std::shared_ptr<GroupedGemmEngine> make_cublas_loop_engine(torch::Device device, int streams);

/// cublasGemmGroupedBatchedEx: all experts in one call, for many small ones.
std::shared_ptr<GroupedGemmEngine> make_cublas_grouped_engine(torch::Device device);

}  // namespace anabranch
