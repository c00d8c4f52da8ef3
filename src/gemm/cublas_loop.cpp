#include "gemm/cublas_loop.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <array>
#include <map>
#include <mutex>

#include "gemm/cublas_lt.h"
#include "support/check.h"
#include "support/cuda_device.h"
#include "support/cuda_handle.h"

namespace anabranch {
namespace {

/// What NVIDIA asks for on Hopper. A workspace of its own keeps a stream's results the same from run
/// to run while other streams are busy.
constexpr int64_t kWorkspaceBytes = int64_t{32} << 20;

/// A side stream with a workspace of its own.
class Lane {
 public:
  explicit Lane(torch::Device device)
      : workspace_(at::empty({kWorkspaceBytes}, at::TensorOptions(device).dtype(torch::kByte))),
        stream_(make_cuda_stream()),
        done_(make_cuda_event()) {}
  /// The workspace goes back to LibTorch's allocator, which knows nothing of the side stream.
  ~Lane() { static_cast<void>(cudaStreamSynchronize(stream_)); }
  Lane(const Lane&) = delete;
  Lane& operator=(const Lane&) = delete;

  void wait_for(cudaEvent_t event) {
    check_cuda(cudaStreamWaitEvent(stream_, event), "cudaStreamWaitEvent");
  }
  CublasSite site() const { return {workspace_.data_ptr(), kWorkspaceBytes, stream_}; }
  void let_wait(cudaStream_t stream) {
    check_cuda(cudaEventRecord(done_, stream_), "cudaEventRecord");
    check_cuda(cudaStreamWaitEvent(stream, done_), "cudaStreamWaitEvent");
  }

 private:
  torch::Tensor workspace_;
  CudaStream stream_;
  CudaEvent done_;
};

/// The lanes of one device, made as they are first needed. One call at a time.
class Lanes {
 public:
  explicit Lanes(torch::Device device) : device_(device), fork_(make_cuda_event()) {}

  void run(CublasProducts shared, int streams, cudaStream_t stream) {
    const std::lock_guard lock(mutex_);
    auto& products = shared.products;
    const int used = std::min(streams, static_cast<int>(products.size()));
    while (static_cast<int>(lanes_.size()) < used) {
      lanes_.push_back(std::make_unique<Lane>(device_));
    }
    // Sizes differ in the ragged dimension only.
    std::stable_sort(products.begin(), products.end(), [](const auto& left, const auto& right) {
      return left.n > right.n || (left.n == right.n && left.k > right.k);
    });
    check_cuda(cudaEventRecord(fork_, stream), "cudaEventRecord");
    for (int i = 0; i < used; ++i) {
      lanes_[i]->wait_for(fork_);
    }
    std::array<int64_t, kMostCublasStreams> load = {};
    for (const CublasProduct& product : products) {
      const auto lane = std::min_element(load.begin(), load.begin() + used) - load.begin();
      load[lane] += product.n * product.k;
      cublas_.multiply(shared, product, lanes_[lane]->site());
    }
    for (int i = 0; i < used; ++i) {
      lanes_[i]->let_wait(stream);
    }
  }

 private:
  torch::Device device_;
  std::mutex mutex_;
  CudaEvent fork_;
  CublasLt cublas_;
  std::vector<std::unique_ptr<Lane>> lanes_;
};

/// The lanes of the current device: one set for all engines that live at the same time.
std::shared_ptr<Lanes> shared_lanes(torch::Device device) {
  static std::mutex mutex;
  static std::map<torch::DeviceIndex, std::weak_ptr<Lanes>> by_device;
  const std::lock_guard lock(mutex);
  auto& known = by_device[device.index()];
  auto lanes = known.lock();
  if (lanes == nullptr) {
    lanes = std::make_shared<Lanes>(device);
    known = lanes;
  }
  return lanes;
}

class CublasLoop final : public GroupedGemmEngine {
 public:
  CublasLoop(std::shared_ptr<Lanes> lanes, int streams)
      : lanes_(std::move(lanes)), streams_(streams) {}

  std::string name() const override { return c10::str("cublas_loop_", streams_); }

  void forward(const torch::Tensor& x, const torch::Tensor& weight,
               const std::vector<int64_t>& counts, torch::Tensor& y) override {
    const OnDevice stream(x);
    lanes_->run(forward_products(x, weight, counts, y, stream), streams_, stream);
  }
  void dgrad(const torch::Tensor& dy, const torch::Tensor& weight,
             const std::vector<int64_t>& counts, torch::Tensor& dx) override {
    const OnDevice stream(dy);
    lanes_->run(dgrad_products(dy, weight, counts, dx, stream), streams_, stream);
  }
  void wgrad(const torch::Tensor& dy, const torch::Tensor& x, const std::vector<int64_t>& counts,
             torch::Tensor& dweight) override {
    const OnDevice stream(dy);
    lanes_->run(wgrad_products(dy, x, counts, dweight, stream), streams_, stream);
  }
  void wgrad_accumulate(const torch::Tensor& dy, const torch::Tensor& x,
                        const std::vector<int64_t>& counts, torch::Tensor& sum) override {
    const OnDevice stream(dy);
    lanes_->run(wgrad_accumulate_products(dy, x, counts, sum, stream), streams_, stream);
  }

 private:
  std::shared_ptr<Lanes> lanes_;
  int streams_;
};

}  // namespace

std::shared_ptr<GroupedGemmEngine> make_cublas_loop_engine(torch::Device device, int streams) {
  check_input(streams >= 1 && streams <= kMostCublasStreams, "cublas_loop runs on 1 to ",
              kMostCublasStreams, " streams, not on ", streams);
  const c10::cuda::CUDAGuard guard(device);
  return std::make_shared<CublasLoop>(shared_lanes(guard.current_device()), streams);
}

}  // namespace anabranch
