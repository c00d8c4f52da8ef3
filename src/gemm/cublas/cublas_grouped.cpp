#include "gemm/cublas/cublas_engines.h"

#include <mutex>

#include "gemm/cublas/cublas_products.h"
#include "support/cuda/device.h"
#include "support/cuda/handle.h"

namespace anabranch {
namespace {

/// A value for every group, as the API takes everything but the matrices: each expert is a group of
/// one product, for sizes are common to a group.
template <typename value_t>
std::vector<value_t> for_each_group(size_t groups, value_t value) {
  return std::vector<value_t>(groups, value);
}

class CublasGrouped final : public CublasProductsEngine {
 public:
  CublasGrouped() : handle_(make_cublas_handle()) {}

  std::string name() const override { return "cublas_grouped"; }

 private:
  void run(const CublasProducts& shared, torch::Device device, cudaStream_t stream) override {
    const size_t groups = shared.products.size();
    if (groups == 0) {
      return;
    }
    if (shared.compute == CUBLAS_COMPUTE_64F) {
      multiply<double>(shared, device, stream);
    } else {
      multiply<float>(shared, device, stream);
    }
  }

  template <typename factor_t>
  void multiply(const CublasProducts& shared, torch::Device device, cudaStream_t stream) {
    const size_t groups = shared.products.size();
    std::vector<int64_t> m;
    std::vector<int64_t> n;
    std::vector<int64_t> k;
    std::vector<int64_t> addresses(3 * groups);  // of the a, then the b, then the c
    for (size_t i = 0; i < groups; ++i) {
      const CublasProduct& product = shared.products[i];
      m.push_back(product.m);
      n.push_back(product.n);
      k.push_back(product.k);
      addresses[i] = reinterpret_cast<int64_t>(product.a);
      addresses[groups + i] = reinterpret_cast<int64_t>(product.b);
      addresses[2 * groups + i] = reinterpret_cast<int64_t>(product.c);
    }
    const torch::Tensor on_device = upload(addresses, device);
    auto* const matrices = reinterpret_cast<void**>(on_device.data_ptr<int64_t>());
    const torch::Tensor workspace =
        at::empty({kWorkspaceBytes}, at::TensorOptions(device).dtype(torch::kByte));
    const std::lock_guard lock(mutex_);
    check_cublas(cublasSetStream(handle_, stream), "cublasSetStream");
    check_cublas(cublasSetWorkspace(handle_, workspace.data_ptr(), kWorkspaceBytes),
                 "cublasSetWorkspace");
    check_cublas(cublasGemmGroupedBatchedEx_64(
                     handle_, for_each_group(groups, shared.a_operation).data(),
                     for_each_group(groups, shared.b_operation).data(), m.data(), n.data(),
                     k.data(), for_each_group(groups, factor_t{1}).data(), matrices, shared.type,
                     for_each_group(groups, shared.lda).data(), matrices + groups, shared.type,
                     for_each_group(groups, shared.ldb).data(),
                     for_each_group(groups, factor_t{0}).data(), matrices + 2 * groups, shared.type,
                     for_each_group(groups, shared.ldc).data(), static_cast<int64_t>(groups),
                     for_each_group(groups, int64_t{1}).data(), shared.compute),
                 "cublasGemmGroupedBatchedEx");
  }

  std::mutex mutex_;
  CublasHandle handle_;
};

}  // namespace

bool runs_cublas(torch::Device device) { return device.is_cuda(); }

std::shared_ptr<GroupedGemmEngine> make_cublas_grouped_engine(torch::Device device) {
  const c10::cuda::CUDAGuard guard(device);
  return std::make_shared<CublasGrouped>();
}

}  // namespace anabranch
