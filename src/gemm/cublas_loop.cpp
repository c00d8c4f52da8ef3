#include "gemm/cublas_loop.h"

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>

#include <algorithm>
#include <exception>
#include <map>
#include <mutex>
#include <optional>
#include <thread>

#include "gemm/cublas_lt.h"
#include "support/check.h"
#include "support/cuda_device.h"
#include "support/cuda_handle.h"
#include "support/thread_team.h"

namespace anabranch {
namespace {

/// What NVIDIA asks for on Hopper. A workspace of its own keeps a stream's results the same from run
/// to run while other streams are busy.
constexpr int64_t kWorkspaceBytes = int64_t{32} << 20;

/// Products that are worth waking threads for: cublasLtMatmul takes the host 6 to 10 us, and so long it
/// takes at least to wake a thread.
constexpr size_t kWorthThreads = 16;

/// A side stream with a workspace and a cuBLAS handle of its own: two threads that share a handle wait
/// for each other.
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
  void multiply(const CublasProducts& shared, const CublasProduct& product) {
    cublas_.multiply(shared, product, {workspace_.data_ptr(), kWorkspaceBytes, stream_});
  }
  void let_wait(cudaStream_t stream) {
    check_cuda(cudaEventRecord(done_, stream_), "cudaEventRecord");
    check_cuda(cudaStreamWaitEvent(stream, done_), "cudaStreamWaitEvent");
  }

 private:
  torch::Tensor workspace_;
  CudaStream stream_;
  CudaEvent done_;
  CublasLt cublas_;
};

/// The lanes of one device, made as they are first needed. One call at a time.
class Lanes {
 public:
  explicit Lanes(torch::Device device) : device_(device), fork_(make_cuda_event()) {}

  void run(CublasProducts shared, int streams, cudaStream_t stream) {
    const std::lock_guard lock(mutex_);
    const size_t used = std::min(static_cast<size_t>(streams), shared.products.size());
    while (lanes_.size() < used) {
      lanes_.push_back(std::make_unique<Lane>(device_));
    }
    check_cuda(cudaEventRecord(fork_, stream), "cudaEventRecord");
    for (size_t lane = 0; lane < used; ++lane) {
      lanes_[lane]->wait_for(fork_);
    }
    // Sizes differ in the ragged dimension only.
    std::stable_sort(shared.products.begin(), shared.products.end(),
                     [](const auto& left, const auto& right) {
                       return left.n > right.n || (left.n == right.n && left.k > right.k);
                     });
    launch(shared, used);
    for (size_t lane = 0; lane < used; ++lane) {
      lanes_[lane]->let_wait(stream);
    }
  }

 private:
  /// Largest first, each on the lane that has least to do.
  void launch(const CublasProducts& shared, size_t lanes) {
    std::vector<int64_t> load(lanes);
    std::vector<size_t> lane_of;
    for (const CublasProduct& product : shared.products) {
      lane_of.push_back(std::min_element(load.begin(), load.end()) - load.begin());
      load[lane_of.back()] += product.n * product.k;
    }
    // A graph that is captured keeps the order of the launches, which threads would leave to chance.
    const auto capture = c10::cuda::currentStreamCaptureStatusMayInitCtx();
    if (lanes > 1 && lane_of.size() >= kWorthThreads && capture == c10::cuda::CaptureStatus::None &&
        std::thread::hardware_concurrency() >= lanes) {
      return launch_with_threads(shared, lane_of, lanes);
    }
    for (size_t i = 0; i < lane_of.size(); ++i) {
      lanes_[lane_of[i]]->multiply(shared, shared.products[i]);
    }
  }

  /// A thread for each lane, the calling one for the first.
  void launch_with_threads(const CublasProducts& shared, const std::vector<size_t>& lane_of,
                           size_t lanes) {
    std::vector<std::exception_ptr> failures(lanes);
    const auto launch_lane = [&](int lane) noexcept {
      try {
        for (size_t i = 0; i < lane_of.size(); ++i) {
          if (lane_of[i] == static_cast<size_t>(lane))
            lanes_[lane]->multiply(shared, shared.products[i]);
        }
      } catch (...) {
        failures[lane] = std::current_exception();
      }
    };
    if (!threads_) {
      threads_.emplace(kMostCublasStreams - 1,
                       [device = device_] { c10::cuda::set_device(device.index()); });
    }
    threads_->run(static_cast<int>(lanes), launch_lane);
    for (const std::exception_ptr& failure : failures) {
      if (failure) std::rethrow_exception(failure);
    }
  }

  torch::Device device_;
  std::mutex mutex_;
  CudaEvent fork_;
  std::vector<std::unique_ptr<Lane>> lanes_;
  std::optional<ThreadTeam> threads_;
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
