#pragma once

#include <array>
#include <map>

#include "gemm/cublas/cublas_products.h"
#include "gemm/cublas/lt_attributes.h"

namespace anabranch {

/// Where a product runs.
struct CublasSite {
  void* workspace;
  size_t workspace_bytes;
  cudaStream_t stream;
};

/// Single products through cuBLASLt, with algorithms that are looked up once: letting cuBLAS choose
/// anew costs more host time than a launch. Sizes that are close to each other share an algorithm,
/// for the number of an expert's tokens is another in every step. One call at a time.
class CublasLt {
 public:
  CublasLt();

  void multiply(const CublasForm& form, const CublasProduct& product, const CublasSite& site);

 private:
  /// All that an algorithm depends on: types, operations, sizes, leading dimensions, alignments.
  using Key = std::array<int64_t, 15>;
  struct Problem;

  static Key key_of(const CublasForm& form, const CublasProduct& product, size_t workspace_bytes);
  cublasLtMatmulAlgo_t choose(const Key& key, Problem& problem) const;

  CublasLtHandle handle_;
  std::map<Key, cublasLtMatmulAlgo_t> algorithms_;
};

}  // namespace anabranch
