#pragma once

#include <anabranch/grouped_gemm.h>
#include <cublas_v2.h>
#include <torch/types.h>

#include <vector>

namespace anabranch {

/// One expert's product in cuBLAS's column-major terms: c [m, n] = op(a) [m, k] · op(b) [k, n]. Or
/// several, where k is the number of tokens: each takes the next k tokens, and writes the next c.
struct CublasProduct {
  const void* a;
  const void* b;
  void* c;
  int64_t m;
  int64_t n;
  int64_t k;
  int64_t batch = 1;
};

/// Which of n and k is the number of an expert's tokens.
enum class Ragged { kN, kK };

/// What the products of a grouped GEMM have in common.
struct CublasForm {
  cudaDataType_t type;
  cudaDataType_t c_type;
  cublasComputeType_t compute;
  cublasOperation_t a_operation;
  cublasOperation_t b_operation;
  int64_t lda;
  int64_t ldb;
  int64_t ldc;
  Ragged ragged;
  bool accumulate;  ///< c += op(a) · op(b)

  /// Of `compute`: what sums are kept in.
  cudaDataType_t sum_type() const {
    return compute == CUBLAS_COMPUTE_64F ? CUDA_R_64F : CUDA_R_32F;
  }
  /// 1, and what c is multiplied by before the product is added, in the type of `compute`.
  const void* alpha() const;
  const void* beta() const;
};

/// Those of them that have work to do.
struct CublasProducts : CublasForm {
  std::vector<CublasProduct> products;
};

/// Bytes of an element.
int64_t element_bytes(cudaDataType_t type);

// Arguments are those of GroupedGemmEngine. Outputs that are sums of nothing are zeroed on `stream`.
CublasProducts forward_products(const torch::Tensor& x, const torch::Tensor& weight,
                                const std::vector<int64_t>& counts, torch::Tensor& y,
                                cudaStream_t stream);
CublasProducts dgrad_products(const torch::Tensor& dy, const torch::Tensor& weight,
                              const std::vector<int64_t>& counts, torch::Tensor& dx,
                              cudaStream_t stream);
CublasProducts wgrad_products(const torch::Tensor& dy, const torch::Tensor& x,
                              const std::vector<int64_t>& counts, torch::Tensor& dweight,
                              cudaStream_t stream);
CublasProducts wgrad_accumulate_products(const torch::Tensor& dy, const torch::Tensor& x,
                                         const std::vector<int64_t>& counts, torch::Tensor& sum,
                                         cudaStream_t stream);

/// An engine that turns each of its calls into such products and runs them.
class CublasProductsEngine : public GroupedGemmEngine {
 protected:
  void do_forward(const torch::Tensor& x, const torch::Tensor& weight, const ExpertCounts& counts,
                  torch::Tensor& y) override;
  void do_dgrad(const torch::Tensor& dy, const torch::Tensor& weight, const ExpertCounts& counts,
                torch::Tensor& dx) override;
  void do_wgrad(const torch::Tensor& dy, const torch::Tensor& x, const ExpertCounts& counts,
                torch::Tensor& dweight) override;

  /// On `stream`, the current one of `device`.
  virtual void run(const CublasProducts& products, torch::Device device, cudaStream_t stream) = 0;
};

/// One whose products may add to numbers of another type, a main gradient's.
class CublasAccumulatingEngine : public CublasProductsEngine {
 protected:
  void do_wgrad_accumulate(const torch::Tensor& dy, const torch::Tensor& x,
                           const ExpertCounts& counts, torch::Tensor& sum) override;
};

}  // namespace anabranch
