#pragma once

#include <cublasLt.h>

#include <algorithm>
#include <bit>
#include <cstdint>

#include "support/cuda/handle.h"

// What the callers of cuBLASLt have in common.

namespace anabranch {

using CublasLtHandle = UniqueHandle<cublasLtHandle_t, cublasLtDestroy>;

inline CublasLtHandle make_lt_handle() {
  cublasLtHandle_t handle = nullptr;
  check_cublas(cublasLtCreate(&handle), "cublasLtCreate");
  return CublasLtHandle(handle);
}

template <typename value_t>
void set(cublasLtMatmulDesc_t operation, cublasLtMatmulDescAttributes_t attribute, value_t value) {
  check_cublas(cublasLtMatmulDescSetAttribute(operation, attribute, &value, sizeof(value)),
               "cublasLtMatmulDescSetAttribute");
}

template <typename value_t>
void set(cublasLtMatmulPreference_t preference, cublasLtMatmulPreferenceAttributes_t attribute,
         value_t value) {
  check_cublas(cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof(value)),
               "cublasLtMatmulPreferenceSetAttribute");
}

/// `size` rounded up to three significant bits, at most a seventh more: sizes that are close to each other
/// share an algorithm.
inline int64_t algorithm_bucket(int64_t size) {
  const int low_bits =
      std::max(0, static_cast<int>(std::bit_width(static_cast<uint64_t>(size))) - 3);
  const int64_t step = int64_t{1} << low_bits;
  return (size + step - 1) / step * step;
}

}  // namespace anabranch
