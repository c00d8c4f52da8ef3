#include "gemm/cublas/cublas_engines.h"

#include <ATen/cuda/CUDAContextLight.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>

#include <algorithm>
#include <exception>
#include <map>
#include <mutex>
#include <optional>
#include <thread>

#include "gemm/cublas/cublas_lt.h"
#include "gemm/cublas/fork.h"
#include "gemm/cublas/sum_parts.h"
#include "support/check.h"
#include "support/cuda/device.h"
#include "support/cuda/handle.h"
#include "support/thread_team.h"

namespace anabranch {
namespace {

/// Products that are worth waking threads for: cublasLtMatmul takes the host 6 to 10 us, and so long it
/// takes at least to wake a thread.
constexpr size_t kWorthThreads = 16;

cuda::Scalar scalar_of(cudaDataType_t type) {
  switch (type) {
    case CUDA_R_64F:
      return cuda::Scalar::kDouble;
    case CUDA_R_16BF:
      return cuda::Scalar::kBFloat16;
    case CUDA_R_16F:
      return cuda::Scalar::kHalf;
    default:
      return cuda::Scalar::kFloat;
  }
}

/// A product, the lane it goes to, and the parts its sum is cut into.
struct Job {
  CublasProduct product;
  size_t lane;
  int64_t parts;
};

/// Whose sum has few results is cut, so that its parts fill the GPU: a weight's gradient. cuBLAS would
/// too, but loses rows: see CublasLt. To leave the filling to other streams does not do: for few tiles
/// cuBLAS takes smaller ones, several times slower. Depends on nothing else that a call multiplies.
int64_t parts_of(const CublasForm& form, const CublasProduct& product, int64_t multiprocessors) {
  if (form.ragged != Ragged::kK) {
    return 1;
  }
  constexpr int64_t kTileRows = 128;
  constexpr int64_t kTileColumns = 256;
  const int64_t tiles =
      (product.m + kTileRows - 1) / kTileRows * ((product.n + kTileColumns - 1) / kTileColumns);
  const int64_t room = multiprocessors / tiles;
  // Shorter, and writing the parts costs more than it gains; products of 16 bits are soon done.
  const int64_t least_part = element_bytes(form.type) == 2 ? 2048 : 512;
  return std::max<int64_t>(std::min(room, product.k / least_part), 1);
}

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

  SideBranch branch() const { return {stream_, done_}; }
  /// `sums`: where the parts of a sum are kept.
  void multiply(const CublasForm& form, const Job& job, void* sums) {
    if (job.parts == 1) {
      return cublas_.multiply(form, job.product, site());
    }
    multiply_parts(form, job, static_cast<std::byte*>(sums));
    const CublasProduct& product = job.product;
    launch_sum_parts(scalar_of(form.c_type), sums, job.parts, product.m * product.n,
                     form.accumulate, product.c, stream_);
  }

 private:
  CublasSite site() const { return {workspace_.data_ptr(), kWorkspaceBytes, stream_}; }

  /// sums [parts, n, m]; the tokens that are left over are added to the first part.
  void multiply_parts(const CublasForm& form, const Job& job, std::byte* sums) {
    CublasForm of_parts = form;
    of_parts.c_type = form.sum_type();
    of_parts.ldc = job.product.m;
    of_parts.accumulate = false;
    CublasProduct part = job.product;
    part.c = sums;
    part.k = job.product.k / job.parts;
    part.batch = job.parts;
    cublas_.multiply(of_parts, part, site());
    const int64_t done = part.k * job.parts;
    if (done < job.product.k) {
      const int64_t bytes = element_bytes(form.type);
      of_parts.accumulate = true;
      part.a = static_cast<const std::byte*>(part.a) + done * form.lda * bytes;
      part.b = static_cast<const std::byte*>(part.b) + done * form.ldb * bytes;
      part.k = job.product.k - done;
      part.batch = 1;
      cublas_.multiply(of_parts, part, site());
    }
  }

  torch::Tensor workspace_;
  CudaStream stream_;
  CudaEvent done_;
  CublasLt cublas_;
};

/// The lanes of one device, made as they are first needed. One call at a time.
class Lanes {
 public:
  explicit Lanes(torch::Device device) : device_(device), begun_(make_cuda_event()) {}

  void run(const CublasProducts& products, int streams, cudaStream_t stream) {
    const std::lock_guard lock(mutex_);
    const auto jobs = jobs_of(products, streams);
    const size_t used = std::min(static_cast<size_t>(streams), jobs.size());
    while (lanes_.size() < used) {
      lanes_.push_back(std::make_unique<Lane>(device_));
    }
    // Of the caller's stream, which waits for the lanes before it can give the memory to others.
    const auto sums = sums_for(products, jobs, used);
    Fork fork(stream, begun_);
    for (size_t lane = 0; lane < used; ++lane) {
      fork.to(lanes_[lane]->branch());
    }
    launch(products, jobs, sums);
    fork.join();
  }

 private:
  using Jobs = std::vector<Job>;
  using Sums = std::vector<torch::Tensor>;

  /// Largest first, each on the lane that has least to do.
  Jobs jobs_of(const CublasProducts& products, int streams) const {
    const int multiprocessors = at::cuda::getDeviceProperties(device_.index())->multiProcessorCount;
    Jobs jobs;
    for (const CublasProduct& product : products.products) {
      jobs.push_back({product, 0, parts_of(products, product, multiprocessors)});
    }
    // Sizes differ in the ragged dimension only.
    std::stable_sort(jobs.begin(), jobs.end(), [](const Job& left, const Job& right) {
      return std::pair(left.product.n, left.product.k) >
             std::pair(right.product.n, right.product.k);
    });
    std::vector<int64_t> load(streams);
    for (Job& job : jobs) {
      job.lane = std::min_element(load.begin(), load.end()) - load.begin();
      load[job.lane] += job.product.n * job.product.k;
    }
    return jobs;
  }

  /// Memory for the parts of each lane's largest sum.
  Sums sums_for(const CublasForm& form, const Jobs& jobs, size_t lanes) const {
    std::vector<int64_t> bytes(lanes);
    for (const Job& job : jobs) {
      if (job.parts > 1) {
        const int64_t needed =
            job.parts * job.product.m * job.product.n * element_bytes(form.sum_type());
        bytes[job.lane] = std::max(bytes[job.lane], needed);
      }
    }
    Sums sums;
    for (const int64_t size : bytes) {
      sums.push_back(at::empty({size}, at::TensorOptions(device_).dtype(torch::kByte)));
    }
    return sums;
  }

  void launch(const CublasForm& form, const Jobs& jobs, const Sums& sums) {
    const size_t lanes = sums.size();
    const auto launch_job = [&](const Job& job) {
      lanes_[job.lane]->multiply(form, job, sums[job.lane].mutable_data_ptr());
    };
    // A graph that is captured keeps the order of the launches, which threads would leave to chance.
    const auto capture = c10::cuda::currentStreamCaptureStatusMayInitCtx();
    if (lanes == 1 || jobs.size() < kWorthThreads || capture != c10::cuda::CaptureStatus::None ||
        std::thread::hardware_concurrency() < lanes) {
      std::for_each(jobs.begin(), jobs.end(), launch_job);
      return;
    }
    // A thread for each lane, the calling one for the first.
    std::vector<std::exception_ptr> failures(lanes);
    const auto launch_lane = [&](int lane) noexcept {
      try {
        for (const Job& job : jobs) {
          if (job.lane == static_cast<size_t>(lane)) launch_job(job);
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
  CudaEvent begun_;
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

class CublasLoop final : public CublasAccumulatingEngine {
 public:
  CublasLoop(std::shared_ptr<Lanes> lanes, int streams)
      : lanes_(std::move(lanes)), streams_(streams) {}

  std::string name() const override { return c10::str("cublas_loop_", streams_); }

 private:
  void run(const CublasProducts& products, torch::Device /*device*/, cudaStream_t stream) override {
    lanes_->run(products, streams_, stream);
  }

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
