#pragma once

#include <c10/core/CPUAllocator.h>

#include <atomic>
#include <cstdint>
#include <new>

namespace anabranch::test {

/// LibTorch's allocator of host memory, of which one allocation fails on demand, on whichever thread it
/// is made. In use as long as it lives.
class FailingAllocator : public c10::Allocator {
 public:
  FailingAllocator() : real_(c10::GetCPUAllocator()) { c10::SetCPUAllocator(this, kPriority); }
  ~FailingAllocator() override { c10::SetCPUAllocator(real_, kPriority); }

  /// The next `successes` allocations succeed, the one behind them fails, and then all succeed again.
  void fail_after(int64_t successes) { left_ = successes; }
  /// None fails. Whether the one that was to fail had come.
  bool stop() { return left_.exchange(kNever) < 0; }

  c10::DataPtr allocate(size_t bytes) override {
    if (left_ != kNever && left_.fetch_sub(1) == 0) {
      throw std::bad_alloc();
    }
    return real_->allocate(bytes);
  }
  c10::DeleterFnPtr raw_deleter() const override { return real_->raw_deleter(); }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

 private:
  static constexpr uint8_t kPriority = 1;
  static constexpr int64_t kNever = INT64_MAX;

  c10::Allocator* real_;
  std::atomic<int64_t> left_{kNever};
};

}  // namespace anabranch::test
