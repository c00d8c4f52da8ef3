#pragma once

#include <c10/core/Allocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>

namespace anabranch::test {

/// Bytes of a device's tensors that are made, and let go, while this lives: by this thread, and by those
/// to which LibTorch hands its state, as autograd's are.
class MemoryMeter {
 public:
  explicit MemoryMeter(c10::DeviceType device)
      : counts_(std::make_shared<Counts>(device)),
        guard_(c10::DebugInfoKind::PROFILER_STATE, counts_) {}

  int64_t alive() const { return counts_->read(counts_->alive); }
  /// Most that were alive at once since the last call.
  int64_t take_most() {
    const std::lock_guard lock(counts_->mutex);
    return std::exchange(counts_->most, counts_->alive);
  }

 private:
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

  std::shared_ptr<Counts> counts_;
  c10::DebugInfoGuard guard_;
};

}  // namespace anabranch::test
