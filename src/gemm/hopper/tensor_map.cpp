#include "gemm/hopper/tensor_map.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <source_location>

#include "support/check.h"
#include "support/cuda/check.h"

namespace anabranch::hopper {
namespace {

constexpr int64_t kElementBytes = 2;

/// The driver's function, which no library of the toolkit links to.
decltype(&cuTensorMapEncodeTiled) encode_function() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                              cudaEnableDefault, &found),
             "cudaGetDriverEntryPointByVersion");
  if (found != cudaDriverEntryPointSuccess) {
    throw CudaError("cudaGetDriverEntryPointByVersion", found,
                    "this driver has no cuTensorMapEncodeTiled: CUDA 12 is needed",
                    std::source_location::current());
  }
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
}

/// Boxes of 64 x 64 elements of the first two dimensions; strides in bytes.
CUtensorMap make_map(const torch::Tensor& tensor, const std::array<int64_t, 4>& sizes,
                     const std::array<int64_t, 3>& strides) {
  static const auto encode = encode_function();
  const auto type = tensor.scalar_type() == torch::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                             : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  void* const data = const_cast<void*>(tensor.const_data_ptr());
  check_input(reinterpret_cast<uintptr_t>(data) % 16 == 0,
              "grouped GEMM: the data of a tensor of shape ", tensor.sizes(),
              " does not begin at a multiple of 16 bytes");
  std::array<cuuint64_t, 4> dimensions;
  std::array<cuuint64_t, 3> steps;
  std::copy(sizes.begin(), sizes.end(), dimensions.begin());
  std::copy(strides.begin(), strides.end(), steps.begin());
  constexpr cuuint32_t kBox[4] = {64, 64, 1, 1};
  constexpr cuuint32_t kElementStrides[4] = {1, 1, 1, 1};
  CUtensorMap map;
  const CUresult status =
      encode(&map, type, 4, data, dimensions.data(), steps.data(), kBox, kElementStrides,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw CudaError(
        "cuTensorMapEncodeTiled", status,
        c10::str("CUresult ", static_cast<int>(status), " for a tensor of shape ", tensor.sizes()),
        std::source_location::current());
  }
  return map;
}

}  // namespace

CUtensorMap rows_map(const torch::Tensor& rows) {
  const int64_t row_bytes = rows.size(1) * kElementBytes;
  return make_map(rows, {rows.size(1), kRowsEnd, rows.size(0) + 1, kRowsWrap + 1},
                  {row_bytes, row_bytes, (int64_t{1} << 34) - row_bytes});
}

CUtensorMap weight_map(const torch::Tensor& weight) {
  const int64_t row_bytes = weight.size(2) * kElementBytes;
  const int64_t expert_bytes = weight.size(1) * row_bytes;
  return make_map(weight, {weight.size(2), weight.size(1), weight.size(0), 1},
                  {row_bytes, expert_bytes, expert_bytes});
}

}  // namespace anabranch::hopper
