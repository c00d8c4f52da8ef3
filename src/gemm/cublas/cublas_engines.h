#pragma once

#include <anabranch/grouped_gemm.h>

namespace anabranch {

/// Whether there is cuBLAS for the device: on every GPU; nowhere in a build without CUDA, in which the
/// engines cannot be made.
bool runs_cublas(torch::Device device);

constexpr int kMostCublasStreams = 8;

/// What NVIDIA asks for on Hopper. A workspace of its own keeps a stream's results the same from run
/// to run while other streams are busy.
inline constexpr int64_t kWorkspaceBytes = int64_t{32} << 20;

/// cuBLASLt expert by expert over 1 to 8 side streams, which fork from the current stream and
/// join it; largest expert first. Engines of one device share the streams.
std::shared_ptr<GroupedGemmEngine> make_cublas_loop_engine(torch::Device device, int streams);

/// cublasGemmGroupedBatchedEx: all experts in one call, for many small ones.
std::shared_ptr<GroupedGemmEngine> make_cublas_grouped_engine(torch::Device device);

/// Whether there is cublaslt_grouped for the device: on compute capability 9.0, where the loaded cuBLAS is
/// new enough.
bool runs_cublaslt_grouped(torch::Device device);

/// cuBLASLt's grouped batch mode: all experts in one call, their sizes and addresses read from GPU memory,
/// so that a graph can record it. bf16 and fp16, sizes that are multiples of 8.
std::shared_ptr<GroupedGemmEngine> make_cublaslt_grouped_engine(torch::Device device);

}  // namespace anabranch
