#pragma once

#include <c10/util/intrusive_ptr.h>

#include <exception>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <utility>

namespace anabranch {

/// From here on the group's sends and receives in a kind of device's memory are one, which `end` starts;
/// where it does not come to that, they are ended all the same, so that the group is left as it was.
class Coalescing {
 public:
  Coalescing(c10d::ProcessGroup& group, c10::DeviceType device) : group_(&group), device_(device) {
    group.startCoalescing(device);
  }
  Coalescing(const Coalescing&) = delete;
  Coalescing& operator=(const Coalescing&) = delete;
  ~Coalescing() {
    try {
      if (group_ != nullptr) {
        end();
      }
    } catch (const std::exception&) {
      // What has failed before is on its way to the caller.
    }
  }

  c10::intrusive_ptr<c10d::Work> end() {
    return std::exchange(group_, nullptr)->endCoalescing(device_);
  }

 private:
  c10d::ProcessGroup* group_;
  c10::DeviceType device_;
};

}  // namespace anabranch
