#pragma once

#include <c10/core/Allocator.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>

namespace anabranch::test {

/// Bytes of a device's tensors that are made, and let go, while this lives. On a CPU by this thread, and by those
/// to which LibTorch hands its state, as autograd's are; on a GPU as they are asked for, by the whole process: what
/// is handed out may be larger by what the allocator does not cut off.
class MemoryMeter {
 public:
  explicit MemoryMeter(c10::Device device)
      : device_(device),
        counts_(std::make_shared<Counts>(device.type())),
        guard_(c10::DebugInfoKind::PROFILER_STATE, counts_),
        before_(device.is_cuda() ? requested().current : 0) {
    take_most();
  }

  int64_t alive() const {
    return device_.is_cuda() ? requested().current - before_ : counts_->read(counts_->alive);
  }
  /// Most that were alive at once since the last call.
  int64_t take_most() {
    if (device_.is_cuda()) {
      const int64_t most = requested().peak - before_;
      at::getDeviceAllocator(device_.type())->resetPeakStats(device_.index());
      return most;
    }
    const std::lock_guard lock(counts_->mutex);
    return std::exchange(counts_->most, counts_->alive);
  }

 private:
  c10::CachingAllocator::Stat requested() const {
    return at::getDeviceAllocator(device_.type())
        ->getDeviceStats(device_.index())
        .requested_bytes[static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE)];
  }

  struct Counts : c10::MemoryReportingInfoBase {
    explicit Counts(c10::DeviceType device) : device(device) {}

    void reportMemoryUsage(void* place, int64_t bytes, size_t /*allocated*/, size_t /*reserved*/,
                           c10::Device of) override {
      if (of.type() != device) return;
      const std::lock_guard lock(mutex);
      if (bytes > 0) {
        known[place] = bytes;
        alive += bytes;
      } else if (const auto made = known.find(place); made != known.end()) {
        alive -= made->second;  // what is older than this is not counted
        known.erase(made);
      }
      most = std::max(most, alive);
    }
    bool memoryProfilingEnabled() const override { return true; }

    int64_t read(const int64_t& value) {
      const std::lock_guard lock(mutex);
      return value;
    }

    c10::DeviceType device;
    std::mutex mutex;
    std::map<void*, int64_t> known;
    int64_t alive = 0;
    int64_t most = 0;
  };

  c10::Device device_;
  std::shared_ptr<Counts> counts_;
  c10::DebugInfoGuard guard_;
  int64_t before_;
};

}  // namespace anabranch::test
