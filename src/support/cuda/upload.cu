#include <algorithm>

#include "support/cuda/check.h"
#include "support/cuda/upload.h"

namespace anabranch {
namespace {

/// As many as fit into the 4 KiB that the parameters of a kernel may take on every GPU.
constexpr int kMost = 480;

struct Values {
  int64_t values[kMost];
};

__global__ void upload_kernel(const __grid_constant__ Values source, int count, int64_t* target) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    target[i] = source.values[i];
  }
}

}  // namespace

void launch_upload(const int64_t* values, int64_t count, int64_t* target, cudaStream_t stream) {
  for (int64_t begin = 0; begin < count; begin += kMost) {
    const auto size = static_cast<int>(std::min<int64_t>(kMost, count - begin));
    Values piece;
    std::copy_n(values + begin, size, piece.values);
    upload_kernel<<<1, 256, 0, stream>>>(piece, size, target + begin);
    check_launch("upload");
  }
}

}  // namespace anabranch
