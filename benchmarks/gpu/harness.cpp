#include "harness.h"

#include <ATen/cuda/CUDAContextLight.h>
#include <c10/cuda/CUDAStream.h>
#include <cublas_v2.h>
#include <torch/headeronly/version.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <ctime>
#include <iostream>
#include <numeric>
#include <random>
#include <stdexcept>

#include "support/cuda_check.h"

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

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

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
  std::vector<std::vector<double>> times(calls.size());
  std::vector<size_t> order(calls.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::mt19937 generator(1);
  for (int round = 0; round < rounds; ++round) {
    // A product that keeps the chip cool lets the next one run at a higher clock: not always the same.
    std::shuffle(order.begin(), order.end(), generator);
    for (const size_t i : order) {
      calls[i]();  // warm for the one that is timed
      times[i].push_back(batch_milliseconds(calls[i], batch[i]));
    }
  }
  std::vector<double> medians;
  for (const auto& of_call : times) {
    medians.push_back(median(of_call));
  }
  return medians;
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

void Record::key(const std::string& name) {
  text_ += (text_.empty() ? "\"" : ", \"") + name + "\": ";
}

Record& Record::add(const std::string& name, const std::string& value) {
  key(name);
  text_ += '"';
  for (const char c : value) {
    text_ += c == '"' || c == '\\' ? std::string{'\\', c} : std::string{c};
  }
  text_ += '"';
  return *this;
}

Record& Record::add(const std::string& name, double value) {
  key(name);
  std::ostringstream number;
  number.precision(5);
  number << value;
  text_ += number.str();
  return *this;
}

Record& Record::add(const std::string& name, int64_t value) {
  key(name);
  text_ += std::to_string(value);
  return *this;
}

Record provenance(const std::string& commit) {
  int driver = 0;
  int runtime = 0;
  check_cuda(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  check_cuda(cudaRuntimeGetVersion(&runtime), "cudaRuntimeGetVersion");
  const std::time_t now = std::time(nullptr);
  char date[32];
  std::strftime(date, sizeof(date), "%Y-%m-%d", std::gmtime(&now));
  return Record()
      .add("gpu", at::cuda::getCurrentDeviceProperties()->name)
      .add("cuda_driver", cuda_version(driver))
      .add("cuda_runtime", cuda_version(runtime))
      .add("cublas", cublas_version())
      .add("torch", TORCH_VERSION)
      .add("date", date)
      .add("commit", commit);
}

Arguments parse_arguments(int argc, char** argv) {
  Arguments arguments;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--quick") {
      arguments.quick = true;
    } else if (argument == "--json" && i + 1 < argc) {
      arguments.json = argv[++i];
    } else if (argument == "--commit" && i + 1 < argc) {
      arguments.commit = argv[++i];
    } else if (argument == "--engine" && i + 1 < argc) {
      arguments.engine = argv[++i];
    } else {
      throw std::invalid_argument("unknown argument '" + argument +
                                  "'; known: --json FILE, --commit HASH, --engine NAME, --quick");
    }
  }
  return arguments;
}

void write_json(const Arguments& arguments, const std::vector<Record>& results) {
  if (arguments.json.empty()) {
    return;
  }
  std::ofstream file(arguments.json);
  file << "{\"provenance\": " << provenance(arguments.commit).json() << ",\n \"results\": [\n";
  for (size_t i = 0; i < results.size(); ++i) {
    file << "  " << results[i].json() << (i + 1 < results.size() ? ",\n" : "\n");
  }
  file << "]}\n";
  file.close();
  if (!file) {
    throw std::runtime_error("cannot write " + arguments.json);
  }
}

int run_benchmark(int argc, char** argv, const std::function<void(const Arguments&)>& run) {
  try {
    run(parse_arguments(argc, argv));
    return 0;
  } catch (const std::exception& error) {
    std::cerr << error.what() << std::endl;
    return 1;
  }
}

}  // namespace anabranch::benchmark
