#pragma once

namespace anabranch {

/// Names what the calling thread does while this lives, for NVIDIA's profilers, where the library is
/// built with CUDA. Without a profiler it costs next to nothing.
class NvtxRange {
 public:
  explicit NvtxRange(const char* name);
  ~NvtxRange();
  NvtxRange(const NvtxRange&) = delete;
  NvtxRange& operator=(const NvtxRange&) = delete;
};

}  // namespace anabranch
