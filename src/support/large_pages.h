#pragma once

#include <sys/mman.h>
#include <torch/types.h>

#include <cstdint>

namespace anabranch {

/// `tensor`, fresh and large: asks the system for large pages where it lies in host memory. The
/// allocator returns large blocks to the system, and taking them again 4 KiB at a time costs as much
/// as a pass over them and more.
inline torch::Tensor on_large_pages(torch::Tensor tensor) {
  constexpr uintptr_t kLargePage = uintptr_t{2} << 20;
  if (tensor.device().is_cpu()) {
    const auto address = reinterpret_cast<uintptr_t>(tensor.data_ptr());
    const uintptr_t first = (address + kLargePage - 1) / kLargePage * kLargePage;
    const uintptr_t last = (address + tensor.nbytes()) / kLargePage * kLargePage;
    if (first < last) {
      // Advice: where the system has no large pages, small ones do.
      static_cast<void>(madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE));
    }
  }
  return tensor;
}

}  // namespace anabranch
