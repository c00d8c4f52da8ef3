#include "gemm/cublas/cublas_lt.h"

#include <bit>

namespace anabranch {
namespace {

/// The largest power of two up to 256 that divides the address of every row.
int64_t alignment(const void* address, int64_t row_bytes) {
  const auto bits = reinterpret_cast<uint64_t>(address) | static_cast<uint64_t>(row_bytes) | 256u;
  return int64_t{1} << std::countr_zero(bits);
}

cublasLtMatrixLayoutOpaque_t layout(cudaDataType_t type, cublasOperation_t operation, int64_t rows,
                                    int64_t columns, int64_t leading) {
  cublasLtMatrixLayoutOpaque_t result;
  if (operation == CUBLAS_OP_T) {
    std::swap(rows, columns);
  }
  check_cublas(cublasLtMatrixLayoutInit(&result, type, rows, columns, leading),
               "cublasLtMatrixLayoutInit");
  return result;
}

/// `count` matrices, each `stride` elements after the last.
void set_batch(cublasLtMatrixLayout_t layout, int64_t count, int64_t stride) {
  const auto narrow = static_cast<int32_t>(count);
  check_cublas(cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &narrow,
                                                sizeof(narrow)),
               "cublasLtMatrixLayoutSetAttribute");
  check_cublas(cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
                                                &stride, sizeof(stride)),
               "cublasLtMatrixLayoutSetAttribute");
}

enum KeyField {
  kType,
  kCType,
  kA,
  kB,
  kM,
  kN,
  kK,
  kLda,
  kLdb,
  kLdc,
  kAlignA,
  kAlignB,
  kAlignC,
  kBatch,
  kWorkspace
};

}  // namespace

/// A product in cuBLASLt's terms.
struct CublasLt::Problem {
  cublasLtMatmulDescOpaque_t operation;
  cublasLtMatrixLayoutOpaque_t a;
  cublasLtMatrixLayoutOpaque_t b;
  cublasLtMatrixLayoutOpaque_t c;

  Problem(const CublasForm& form, int64_t m, int64_t n, int64_t k, int64_t batch)
      : a(layout(form.type, form.a_operation, m, k, form.lda)),
        b(layout(form.type, form.b_operation, k, n, form.ldb)),
        c(layout(form.c_type, CUBLAS_OP_N, m, n, form.ldc)) {
    check_cublas(cublasLtMatmulDescInit(&operation, form.compute, form.sum_type()),
                 "cublasLtMatmulDescInit");
    set<int32_t>(&operation, CUBLASLT_MATMUL_DESC_TRANSA, form.a_operation);
    set<int32_t>(&operation, CUBLASLT_MATMUL_DESC_TRANSB, form.b_operation);
    if (batch > 1) {
      set_batch(&a, batch, k * form.lda);
      set_batch(&b, batch, k * form.ldb);
      set_batch(&c, batch, n * form.ldc);
    }
  }
};

CublasLt::CublasLt() : handle_(make_lt_handle()) {}

CublasLt::Key CublasLt::key_of(const CublasForm& form, const CublasProduct& product,
                               size_t workspace_bytes) {
  const int64_t bytes = element_bytes(form.type);
  const int64_t c_bytes = element_bytes(form.c_type);
  return {form.type,
          form.c_type,
          form.a_operation,
          form.b_operation,
          product.m,
          form.ragged == Ragged::kN ? algorithm_bucket(product.n) : product.n,
          form.ragged == Ragged::kK ? algorithm_bucket(product.k) : product.k,
          form.lda,
          form.ldb,
          form.ldc,
          alignment(product.a, form.lda * bytes),
          alignment(product.b, form.ldb * bytes),
          alignment(product.c, form.ldc * c_bytes),
          product.batch,
          static_cast<int64_t>(workspace_bytes)};
}

cublasLtMatmulAlgo_t CublasLt::choose(const Key& key, Problem& problem) const {
  cublasLtMatmulPreferenceOpaque_t preference;
  check_cublas(cublasLtMatmulPreferenceInit(&preference), "cublasLtMatmulPreferenceInit");
  set<uint64_t>(&preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, key[kWorkspace]);
  set<uint32_t>(&preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, key[kAlignA]);
  set<uint32_t>(&preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, key[kAlignB]);
  set<uint32_t>(&preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, key[kAlignC]);
  set<uint32_t>(&preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, key[kAlignC]);
  // No sum over k is split: the algorithms that do lose rows at some k above 8192, such as 8193 at
  // m = n = 512 (issue 6580689 of cuBLAS's release notes: from 12.6.3 on, mended after CUDA 13.4), and sums
  // of parts in 16 bits would lose what fp32 accumulation has gained.
  set<uint32_t>(&preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                CUBLASLT_REDUCTION_SCHEME_NONE);
  cublasLtMatmulHeuristicResult_t found;
  int count = 0;
  check_cublas(
      cublasLtMatmulAlgoGetHeuristic(handle_, &problem.operation, &problem.a, &problem.b,
                                     &problem.c, &problem.c, &preference, 1, &found, &count),
      "cublasLtMatmulAlgoGetHeuristic");
  check_cublas(count > 0 ? found.state : CUBLAS_STATUS_NOT_SUPPORTED,
               "cublasLtMatmulAlgoGetHeuristic");
  return found.algo;
}

void CublasLt::multiply(const CublasForm& form, const CublasProduct& product,
                        const CublasSite& site) {
  Problem problem(form, product.m, product.n, product.k, product.batch);
  const Key key = key_of(form, product, site.workspace_bytes);
  auto known = algorithms_.find(key);
  if (known == algorithms_.end()) {
    Problem typical(form, key[kM], key[kN], key[kK], key[kBatch]);
    known = algorithms_.emplace(key, choose(key, typical)).first;
  }
  const auto run = [&](const cublasLtMatmulAlgo_t& algorithm) {
    return cublasLtMatmul(handle_, &problem.operation, form.alpha(), product.a, &problem.a,
                          product.b, &problem.b, form.beta(), product.c, &problem.c, product.c,
                          &problem.c, &algorithm, site.workspace, site.workspace_bytes,
                          site.stream);
  };
  auto status = run(known->second);
  if (status == CUBLAS_STATUS_NOT_SUPPORTED || status == CUBLAS_STATUS_INVALID_VALUE) {
    // The algorithm of its neighbours does not fit this size.
    status = run(choose(key, problem));
  }
  check_cublas(status, "cublasLtMatmul");
}

}  // namespace anabranch
