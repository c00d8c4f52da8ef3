#include "measure.h"

#include <c10/core/CPUAllocator.h>

#include <atomic>
#include <chrono>

#include "harness.h"

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

}  // namespace

std::vector<double> milliseconds(const std::vector<std::function<void()>>& calls, int rounds) {
  return medians_in_turn(calls.size(), rounds, [&](size_t i) {
    const auto start = std::chrono::steady_clock::now();
    calls[i]();
    const std::chrono::duration<double, std::milli> elapsed =
        std::chrono::steady_clock::now() - start;
    return elapsed.count();
  });
}

int64_t peak_bytes(const std::function<void()>& call) {
  auto& allocator = counting_allocator();
  allocator.reset_peak();
  const int64_t before = allocator.held();
  call();
  return allocator.peak() - before;
}

}  // namespace anabranch::benchmark
