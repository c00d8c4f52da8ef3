#include "measure.h"

#include <ATen/cuda/CUDAContextLight.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cublas_v2.h>

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <string>

#include "support/cuda/check.h"

namespace anabranch::benchmark {
namespace {

using Clock = std::chrono::steady_clock;

class Event {
 public:
  Event() { check_cuda(cudaEventCreate(&event_), "cudaEventCreate"); }
  ~Event() { static_cast<void>(cudaEventDestroy(event_)); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  void record() {
    check_cuda(cudaEventRecord(event_, c10::cuda::getCurrentCUDAStream()), "cudaEventRecord");
  }
  double milliseconds_since(const Event& begin) const {
    float result = 0;
    check_cuda(cudaEventSynchronize(event_), "cudaEventSynchronize");
    check_cuda(cudaEventElapsedTime(&result, begin.event_, event_), "cudaEventElapsedTime");
    return result;
  }

 private:
  cudaEvent_t event_ = nullptr;
};

/// 13020 → "13.2"
std::string cuda_version(int number) {
  return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

std::string cublas_version() {
  std::string version;
  for (const auto property : {MAJOR_VERSION, MINOR_VERSION, PATCH_LEVEL}) {
    int number = 0;
    if (cublasGetProperty(property, &number) != CUBLAS_STATUS_SUCCESS) {
      throw std::runtime_error("cublasGetProperty failed");
    }
    if (!version.empty()) {
      version += '.';
    }
    version += std::to_string(number);
  }
  return version;
}

}  // namespace

double batch_milliseconds(const std::function<void()>& call, int calls) {
  Event begin;
  Event end;
  begin.record();
  for (int i = 0; i < calls; ++i) {
    call();
  }
  end.record();
  return end.milliseconds_since(begin) / calls;
}

double gpu_milliseconds(const std::function<void()>& call) {
  constexpr double kBatchMilliseconds = 8;
  constexpr int kBatches = 7;
  for (int i = 0; i < 3; ++i) {
    call();
  }
  const double estimate = batch_milliseconds(call, 3);
  const int calls = std::clamp(static_cast<int>(kBatchMilliseconds / estimate), 1, 200);
  std::vector<double> batches;
  for (int i = 0; i < kBatches; ++i) {
    batches.push_back(batch_milliseconds(call, calls));
  }
  return median(batches);
}

std::vector<double> gpu_milliseconds(const std::vector<std::function<void()>>& calls, int rounds) {
  constexpr double kBatchMilliseconds = 2;
  std::vector<int> batch;
  for (const auto& call : calls) {
    call();
    const double estimate = batch_milliseconds(call, 1);
    batch.push_back(std::clamp(static_cast<int>(kBatchMilliseconds / estimate), 2, 50));
  }
  const auto measure = [&](size_t i) {
    calls[i]();  // warm for those that are timed
    return batch_milliseconds(calls[i], batch[i]);
  };
  return medians_in_turn(calls.size(), rounds, measure, /*warm_up=*/0);
}

double host_microseconds(const std::function<void()>& call) {
  constexpr int kBatches = 20;
  std::vector<double> batches;
  for (int i = 0; i < kBatches; ++i) {
    check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    const auto begin = Clock::now();
    call();
    batches.push_back(std::chrono::duration<double, std::micro>(Clock::now() - begin).count());
  }
  check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  return median(batches);
}

Replayed::Replayed(const std::function<void()>& step) {
  const auto stream = c10::cuda::getStreamFromPool();
  const c10::cuda::CUDAStreamGuard guard(stream);
  step();
  stream.synchronize();
  graph_.capture_begin();
  step();
  graph_.capture_end();
  stream.synchronize();
}

void write_gpu_results(const Arguments& arguments, const Json& results) {
  int driver = 0;
  int runtime = 0;
  check_cuda(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  check_cuda(cudaRuntimeGetVersion(&runtime), "cudaRuntimeGetVersion");
  write_results(arguments, results,
                {{"gpu", at::cuda::getCurrentDeviceProperties()->name},
                 {"cuda_driver", cuda_version(driver)},
                 {"cuda_runtime", cuda_version(runtime)},
                 {"cublas", cublas_version()}});
}

}  // namespace anabranch::benchmark
