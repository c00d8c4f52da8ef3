#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace anabranch {

/// Of one slice along dimension 0.
inline int64_t row_bytes(const at::Tensor& rows) {
  auto bytes = static_cast<int64_t>(rows.element_size());
  for (const int64_t size : rows.sizes().slice(1)) {
    bytes *= size;
  }
  return bytes;
}

}  // namespace anabranch
