#include "harness.h"

#include <ATen/Parallel.h>
#include <c10/core/CPUAllocator.h>
#include <torch/version.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <atomic>
#include <chrono>
#include <ctime>
#include <fstream>
#include <stdexcept>

namespace anabranch::benchmark {
namespace {

/// LibTorch's own allocator, with a count of the bytes it holds.
class CountingAllocator final : public c10::Allocator {
 public:
  explicit CountingAllocator(c10::Allocator* inner) : inner_(inner) {}

  c10::DataPtr allocate(size_t bytes) override {
    auto* block = new Block{inner_->allocate(bytes), static_cast<int64_t>(bytes)};
    const int64_t held = held_ += block->bytes;
    int64_t peak = peak_.load();
    while (held > peak && !peak_.compare_exchange_weak(peak, held)) {
    }
    return {block->data.get(), block, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }  // the context is the block
  void copy_data(void* target, const void* source, size_t bytes) const override {
    default_copy_data(target, source, bytes);
  }

  int64_t held() const { return held_; }
  int64_t peak() const { return peak_; }
  void reset_peak() { peak_ = held_.load(); }

 private:
  struct Block {
    c10::DataPtr data;
    int64_t bytes;
  };
  static void release(void* block) {
    held_ -= static_cast<Block*>(block)->bytes;
    delete static_cast<Block*>(block);
  }

  c10::Allocator* inner_;
  static inline std::atomic<int64_t> held_ = 0;
  std::atomic<int64_t> peak_ = 0;
};

CountingAllocator& counting_allocator() {
  static CountingAllocator allocator(c10::GetDefaultCPUAllocator());
  static const bool installed = [] {
    c10::SetCPUAllocator(&allocator, /*priority=*/1);
    return true;
  }();
  (void)installed;
  return allocator;
}

std::string processor() {
  std::ifstream cpuinfo("/proc/cpuinfo");
  for (std::string line; std::getline(cpuinfo, line);) {
    if (line.starts_with("model name")) {
      return line.substr(line.find(':') + 2);
    }
  }
  return "unknown";
}

std::string today() {
  const std::time_t now = std::time(nullptr);
  char text[sizeof "2000-01-01"];
  std::strftime(text, sizeof text, "%Y-%m-%d", std::gmtime(&now));
  return text;
}

}  // namespace

std::vector<double> milliseconds(const std::vector<std::function<void()>>& calls, int rounds) {
  using Clock = std::chrono::steady_clock;
  std::vector<std::vector<double>> times(calls.size());
  for (int round = -1; round < rounds; ++round) {
    for (size_t i = 0; i < calls.size(); ++i) {
      const auto start = Clock::now();
      calls[i]();
      const std::chrono::duration<double, std::milli> elapsed = Clock::now() - start;
      if (round >= 0) {
        times[i].push_back(elapsed.count());
      }
    }
  }
  std::vector<double> medians;
  for (auto& samples : times) {
    std::nth_element(samples.begin(), samples.begin() + rounds / 2, samples.end());
    medians.push_back(samples[rounds / 2]);
  }
  return medians;
}

int64_t peak_bytes(const std::function<void()>& call) {
  auto& allocator = counting_allocator();
  allocator.reset_peak();
  const int64_t before = allocator.held();
  call();
  return allocator.peak() - before;
}

Arguments parse_arguments(int argc, char** argv, const std::string& description) {
  Arguments arguments;
  CLI::App app(description);
  app.add_option("--json", arguments.json, "file to write the results to");
  app.add_option("--commit", arguments.commit, "commit of the measured sources, for the record");
  app.add_option("--rounds", arguments.rounds, "timed rounds")->check(CLI::PositiveNumber);
  app.add_option("--threads", arguments.threads, "threads; 0: LibTorch's default");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    std::exit(app.exit(error));
  }
  if (arguments.threads > 0) {
    at::set_num_threads(arguments.threads);
  }
  return arguments;
}

void write_results(const Arguments& arguments, const nlohmann::json& results) {
  if (arguments.json.empty()) {
    return;
  }
  std::ofstream file(arguments.json);
  file << nlohmann::json{{"provenance",
                          {{"processor", processor()},
                           {"threads", at::get_num_threads()},
                           {"torch", TORCH_VERSION},
                           {"compiler", __VERSION__},
                           {"commit", arguments.commit},
                           {"date", today()}}},
                         {"results", results}}
              .dump(1)
       << '\n';
  if (!file.flush()) {
    throw std::runtime_error("cannot write " + arguments.json);
  }
}

}  // namespace anabranch::benchmark
