#include <ATen/cuda/CUDAContextLight.h>
#include <ATen/ops/empty.h>

#include <array>
#include <bit>
#include <map>
#include <mutex>

#include "gemm/cublas/cublas_engines.h"
#include "gemm/cublas/cublas_products.h"
#include "gemm/cublas/cublaslt_grouped_api.h"
#include "gemm/cublas/lt_attributes.h"
#include "support/check.h"
#include "support/cuda/device.h"

namespace anabranch {
namespace {

constexpr int64_t kMostGroups = 1023;  // of one call

using Layout = UniqueHandle<cublasLtMatrixLayout_t, cublasLtMatrixLayoutDestroy>;

/// The products' addresses and sizes as the API takes them, int64 in GPU memory: of each an array over the
/// groups. After them the factors 1 and 0: with those in host memory products of many waves come out wrong
/// (issue 6681084 of cuBLAS's release notes).
class DeviceArrays {
 public:
  enum Array { kA, kB, kC, kM, kN, kK, kLda, kLdb, kLdc, kArrays };

  DeviceArrays(const CublasForm& form, const CublasProduct* products, int64_t groups,
               torch::Device device)
      : groups_(groups) {
    std::vector<int64_t> values(kArrays * groups);
    for (int64_t g = 0; g < groups; ++g) {
      const CublasProduct& product = products[g];
      const int64_t of_group[kArrays] = {reinterpret_cast<int64_t>(product.a),
                                         reinterpret_cast<int64_t>(product.b),
                                         reinterpret_cast<int64_t>(product.c),
                                         product.m,
                                         product.n,
                                         product.k,
                                         form.lda,
                                         form.ldb,
                                         form.ldc};
      for (int array = 0; array < kArrays; ++array) {
        values[array * groups + g] = of_group[array];
      }
    }
    values.push_back(std::bit_cast<int64_t>(std::array<float, 2>{1, 0}));
    on_device_ = upload(values, device);
  }
  void* operator[](Array array) const { return on_device_.data_ptr<int64_t>() + array * groups_; }
  const float* one() const {
    return reinterpret_cast<const float*>(on_device_.const_data_ptr<int64_t>() + kArrays * groups_);
  }
  const float* zero() const { return one() + 1; }

 private:
  int64_t groups_;
  torch::Tensor on_device_;
};

class CublasLtGrouped final : public CublasAccumulatingEngine {
 public:
  CublasLtGrouped()
      : create_layout_(cublaslt_grouped::find_layout_create()), handle_(make_lt_handle()) {}

  std::string name() const override { return "cublaslt_grouped"; }

  /// Rows must be multiples of 16 bytes; there are no products of 32 bits and more.
  bool supports(torch::Dtype dtype, int64_t n, int64_t k) const override {
    return (dtype == torch::kBFloat16 || dtype == torch::kHalf) && n > 0 && k > 0 && n % 8 == 0 &&
           k % 8 == 0;
  }

 private:
  /// What an algorithm is chosen by.
  using Key = std::array<int64_t, 9>;

  void run(const CublasProducts& shared, torch::Device device, cudaStream_t stream) override {
    const std::lock_guard lock(mutex_);
    const auto all = static_cast<int64_t>(shared.products.size());
    for (int64_t begin = 0; begin < all; begin += kMostGroups) {
      multiply(shared, shared.products.data() + begin, std::min(kMostGroups, all - begin), device,
               stream);
    }
  }

  void multiply(const CublasForm& form, const CublasProduct* products, int64_t groups,
                torch::Device device, cudaStream_t stream) {
    const DeviceArrays arrays(form, products, groups, device);
    cublasLtMatmulDescOpaque_t operation;
    check_cublas(cublasLtMatmulDescInit(&operation, form.compute, form.sum_type()),
                 "cublasLtMatmulDescInit");
    set<int32_t>(&operation, CUBLASLT_MATMUL_DESC_TRANSA, form.a_operation);
    set<int32_t>(&operation, CUBLASLT_MATMUL_DESC_TRANSB, form.b_operation);
    set<int32_t>(&operation, CUBLASLT_MATMUL_DESC_POINTER_MODE, CUBLASLT_POINTER_MODE_DEVICE);
    using Array = DeviceArrays::Array;
    const auto layout = [&](cudaDataType_t type, cublasOperation_t transposed, Array rows,
                            Array columns, Array leading) {
      if (transposed == CUBLAS_OP_T) std::swap(rows, columns);
      cublasLtMatrixLayout_t created = nullptr;
      check_cublas(create_layout_(&created, type, static_cast<int>(groups), arrays[rows],
                                  arrays[columns], arrays[leading]),
                   "cublasLtGroupedMatrixLayoutCreate");
      return Layout(created);
    };
    const Layout a = layout(form.type, form.a_operation, Array::kM, Array::kK, Array::kLda);
    const Layout b = layout(form.type, form.b_operation, Array::kK, Array::kN, Array::kLdb);
    const Layout c = layout(form.c_type, CUBLAS_OP_N, Array::kM, Array::kN, Array::kLdc);

    const Key key = key_of(form, products, groups);
    auto known = algorithms_.find(key);
    if (known == algorithms_.end()) {
      known = algorithms_.emplace(key, choose(key, &operation, a, b, c)).first;
    }
    const torch::Tensor workspace =
        at::empty({kWorkspaceBytes}, at::TensorOptions(device).dtype(torch::kByte));
    check_cublas(
        cublasLtMatmul(handle_, &operation, arrays.one(), arrays[Array::kA], a, arrays[Array::kB],
                       b, form.accumulate ? arrays.one() : arrays.zero(), arrays[Array::kC], c,
                       arrays[Array::kC], c, &known->second, workspace.data_ptr(), kWorkspaceBytes,
                       stream),
        "cublasLtMatmul");
  }

  static Key key_of(const CublasForm& form, const CublasProduct* products, int64_t groups) {
    int64_t n = 0;
    int64_t k = 0;
    for (int64_t g = 0; g < groups; ++g) {
      n += products[g].n;
      k += products[g].k;
    }
    return {form.type,
            form.c_type,
            form.a_operation,
            form.b_operation,
            form.accumulate ? 1 : 0,
            algorithm_bucket(groups),
            products[0].m,
            algorithm_bucket(n / groups),
            algorithm_bucket(k / groups)};
  }

  cublasLtMatmulAlgo_t choose(const Key& key, cublasLtMatmulDesc_t operation,
                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                              cublasLtMatrixLayout_t c) const {
    constexpr uint32_t kAlignment = 16;  // of every row, see supports
    cublasLtMatmulPreferenceOpaque_t preference;
    check_cublas(cublasLtMatmulPreferenceInit(&preference), "cublasLtMatmulPreferenceInit");
    set<uint64_t>(&preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, kWorkspaceBytes);
    for (const auto operand :
         {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
          CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES}) {
      set<uint32_t>(&preference, operand, kAlignment);
    }
    // No sum over k is split, see CublasLt::choose.
    set<uint32_t>(&preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                  CUBLASLT_REDUCTION_SCHEME_NONE);
    set<int64_t>(&preference, cublaslt_grouped::kAverageRows, key[6]);
    set<int64_t>(&preference, cublaslt_grouped::kAverageColumns, key[7]);
    set<int64_t>(&preference, cublaslt_grouped::kAverageK, key[8]);
    cublasLtMatmulHeuristicResult_t found;
    int count = 0;
    check_cublas(cublasLtMatmulAlgoGetHeuristic(handle_, operation, a, b, c, c, &preference, 1,
                                                &found, &count),
                 "cublasLtMatmulAlgoGetHeuristic");
    check_cublas(count > 0 ? found.state : CUBLAS_STATUS_NOT_SUPPORTED,
                 "cublasLtMatmulAlgoGetHeuristic");
    return found.algo;
  }

  cublaslt_grouped::LayoutCreate create_layout_;
  std::mutex mutex_;
  CublasLtHandle handle_;
  std::map<Key, cublasLtMatmulAlgo_t> algorithms_;
};

}  // namespace

bool runs_cublaslt_grouped(torch::Device device) {
  if (!device.is_cuda() || c10::cuda::device_count() == 0 ||
      cublaslt_grouped::find_layout_create() == nullptr) {
    return false;
  }
  const auto* properties = device.has_index() ? at::cuda::getDeviceProperties(device.index())
                                              : at::cuda::getCurrentDeviceProperties();
  return properties->major == 9 && properties->minor == 0;
}

std::shared_ptr<GroupedGemmEngine> make_cublaslt_grouped_engine(torch::Device device) {
  const c10::cuda::CUDAGuard guard(device);
  return std::make_shared<CublasLtGrouped>();
}

}  // namespace anabranch
