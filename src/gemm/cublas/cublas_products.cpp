#include "gemm/cublas/cublas_products.h"

#include "support/check.h"
#include "support/cuda/check.h"
#include "support/cuda/device.h"

namespace anabranch {
namespace {

cudaDataType_t data_type(const torch::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case torch::kFloat32:
      return CUDA_R_32F;
    case torch::kFloat64:
      return CUDA_R_64F;
    case torch::kBFloat16:
      return CUDA_R_16BF;
    case torch::kFloat16:
      return CUDA_R_16F;
    default:
      throw InputError(c10::str("grouped GEMM on a GPU takes fp32, fp64, bf16 and fp16, not ",
                                tensor.scalar_type()));
  }
}

int64_t bytes_of_element(const torch::Tensor& tensor) {
  return static_cast<int64_t>(tensor.element_size());
}

/// A matrix per expert: at a fixed distance from one to the next, or as far as its rows reach.
struct Operand {
  char* data;
  int64_t expert_bytes;  // 0: rows of the experts' tokens
  int64_t row_bytes;

  static Operand of_experts(const torch::Tensor& weight) {
    return {address(weight), weight.stride(0) * bytes_of_element(weight), 0};
  }
  static Operand of_tokens(const torch::Tensor& rows) {
    return {address(rows), 0, rows.size(1) * bytes_of_element(rows)};
  }
  static char* address(const torch::Tensor& tensor) {
    return static_cast<char*>(const_cast<void*>(tensor.const_data_ptr()));
  }
  char* at(int64_t expert, int64_t first_row) const {
    return data + expert * expert_bytes + first_row * row_bytes;
  }
};

/// Fills `shared.products`; `shape` gives the sizes that do not depend on the expert.
void add_products(CublasProducts& shared, const Operand& a, const Operand& b, const Operand& c,
                  CublasProduct shape, const std::vector<int64_t>& counts, int64_t element_bytes,
                  cudaStream_t stream) {
  int64_t first_row = 0;
  for (size_t e = 0; e < counts.size(); first_row += counts[e], ++e) {
    const auto expert = static_cast<int64_t>(e);
    (shared.ragged == Ragged::kN ? shape.n : shape.k) = counts[e];
    if (shape.m == 0 || shape.n == 0) {
      continue;
    }
    shape.a = a.at(expert, first_row);
    shape.b = b.at(expert, first_row);
    shape.c = c.at(expert, first_row);
    if (shape.k > 0) {
      shared.products.push_back(shape);
    } else if (!shared.accumulate) {
      check_cuda(cudaMemsetAsync(shape.c, 0, shape.m * shape.n * element_bytes, stream),
                 "cudaMemsetAsync");
    }
  }
}

CublasProducts shared_part(const torch::Tensor& tensor, cublasOperation_t a, cublasOperation_t b,
                           int64_t lda, int64_t ldb, int64_t ldc, Ragged ragged) {
  const auto type = data_type(tensor);
  const auto compute = type == CUDA_R_64F ? CUBLAS_COMPUTE_64F : CUBLAS_COMPUTE_32F;
  // cuBLAS wants leading dimensions of at least 1, also of empty matrices.
  return {{type, type, compute, a, b, std::max<int64_t>(lda, 1), std::max<int64_t>(ldb, 1),
           std::max<int64_t>(ldc, 1), ragged, /*accumulate=*/false},
          {}};
}

}  // namespace

int64_t element_bytes(cudaDataType_t type) {
  return type == CUDA_R_64F ? 8 : type == CUDA_R_32F ? 4 : 2;
}

const void* CublasForm::alpha() const {
  static constexpr float kFloat = 1;
  static constexpr double kDouble = 1;
  return compute == CUBLAS_COMPUTE_64F ? static_cast<const void*>(&kDouble) : &kFloat;
}

const void* CublasForm::beta() const {
  static constexpr float kFloat = 0;
  static constexpr double kDouble = 0;
  if (accumulate) {
    return alpha();
  }
  return compute == CUBLAS_COMPUTE_64F ? static_cast<const void*>(&kDouble) : &kFloat;
}

// A row-major [rows, columns] matrix is a column-major [columns, rows] one.

CublasProducts forward_products(const torch::Tensor& x, const torch::Tensor& weight,
                                const std::vector<int64_t>& counts, torch::Tensor& y,
                                cudaStream_t stream) {
  const int64_t n = weight.size(1);
  const int64_t k = weight.size(2);
  auto shared = shared_part(x, CUBLAS_OP_T, CUBLAS_OP_N, k, k, n, Ragged::kN);
  add_products(shared, Operand::of_experts(weight), Operand::of_tokens(x), Operand::of_tokens(y),
               {nullptr, nullptr, nullptr, n, 0, k}, counts, bytes_of_element(x), stream);
  return shared;
}

CublasProducts dgrad_products(const torch::Tensor& dy, const torch::Tensor& weight,
                              const std::vector<int64_t>& counts, torch::Tensor& dx,
                              cudaStream_t stream) {
  const int64_t n = weight.size(1);
  const int64_t k = weight.size(2);
  auto shared = shared_part(dy, CUBLAS_OP_N, CUBLAS_OP_N, k, n, k, Ragged::kN);
  add_products(shared, Operand::of_experts(weight), Operand::of_tokens(dy), Operand::of_tokens(dx),
               {nullptr, nullptr, nullptr, k, 0, n}, counts, bytes_of_element(dy), stream);
  return shared;
}

namespace {

CublasProducts wgrad_products(const torch::Tensor& dy, const torch::Tensor& x,
                              const std::vector<int64_t>& counts, const torch::Tensor& result,
                              bool accumulate, cudaStream_t stream) {
  const int64_t n = result.size(1);
  const int64_t k = result.size(2);
  auto shared = shared_part(dy, CUBLAS_OP_N, CUBLAS_OP_T, k, n, k, Ragged::kK);
  shared.c_type = data_type(result);
  shared.accumulate = accumulate;
  add_products(shared, Operand::of_tokens(x), Operand::of_tokens(dy), Operand::of_experts(result),
               {nullptr, nullptr, nullptr, k, n, 0}, counts, bytes_of_element(result), stream);
  return shared;
}

}  // namespace

CublasProducts wgrad_products(const torch::Tensor& dy, const torch::Tensor& x,
                              const std::vector<int64_t>& counts, torch::Tensor& dweight,
                              cudaStream_t stream) {
  return wgrad_products(dy, x, counts, dweight, /*accumulate=*/false, stream);
}

CublasProducts wgrad_accumulate_products(const torch::Tensor& dy, const torch::Tensor& x,
                                         const std::vector<int64_t>& counts, torch::Tensor& sum,
                                         cudaStream_t stream) {
  return wgrad_products(dy, x, counts, sum, /*accumulate=*/true, stream);
}

void CublasProductsEngine::do_forward(const torch::Tensor& x, const torch::Tensor& weight,
                                      const ExpertCounts& counts, torch::Tensor& y) {
  const OnDevice stream(x);
  run(forward_products(x, weight, counts.on_host(), y, stream), x.device(), stream);
}

void CublasProductsEngine::do_dgrad(const torch::Tensor& dy, const torch::Tensor& weight,
                                    const ExpertCounts& counts, torch::Tensor& dx) {
  const OnDevice stream(dy);
  run(dgrad_products(dy, weight, counts.on_host(), dx, stream), dy.device(), stream);
}

void CublasProductsEngine::do_wgrad(const torch::Tensor& dy, const torch::Tensor& x,
                                    const ExpertCounts& counts, torch::Tensor& dweight) {
  const OnDevice stream(dy);
  run(wgrad_products(dy, x, counts.on_host(), dweight, stream), dy.device(), stream);
}

void CublasAccumulatingEngine::do_wgrad_accumulate(const torch::Tensor& dy, const torch::Tensor& x,
                                                   const ExpertCounts& counts, torch::Tensor& sum) {
  const OnDevice stream(dy);
  run(wgrad_accumulate_products(dy, x, counts.on_host(), sum, stream), dy.device(), stream);
}

}  // namespace anabranch
