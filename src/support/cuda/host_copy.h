#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <optional>

namespace anabranch {

/// A tensor's values on their way to host memory, behind what its device's current stream has been given
/// so far. Whoever wants them waits for no more than that, whatever the stream was given since. What is in
/// host memory already is taken as it is, and stays so.
class HostCopy {
 public:
  explicit HostCopy(const at::Tensor& values) : values_(values) {
    if (!values.is_cpu()) {
      values_ = at::empty(values.sizes(), values.options().device(at::kCPU).pinned_memory(true));
      values_.copy_(values, /*non_blocking=*/true);
      const c10::impl::VirtualGuardImpl backend(values.device().type());
      arrived_.emplace(values.device().type());
      arrived_->record(backend.getStream(values.device()));
    }
  }

  /// The host waits for them.
  const at::Tensor& wait() const {
    if (arrived_.has_value()) {
      arrived_->synchronize();
    }
    return values_;
  }

 private:
  at::Tensor values_;
  std::optional<c10::Event> arrived_;
};

}  // namespace anabranch
