#pragma once

#include <torch/types.h>

#include <memory>

namespace anabranch {

/// Steps that the device refused when the call that began them had returned: routings that are invalid, and
/// what exceeds a rank's room. One mailbox for each exchange, in memory that both see: a step writes into it,
/// see LateRefusal and PlanKernels::tell, nobody waits.
class LateRefusals {
 public:
  /// `known`, or a mailbox of its own for steps on another device.
  static std::shared_ptr<LateRefusals> for_device(torch::Device device,
                                                  std::shared_ptr<LateRefusals> known);

  torch::Device device() const { return device_; }
  /// [4] int64, pinned where the device is a GPU, −1 where there is nothing to tell: this rank's token whose
  /// gate is not finite, and the one whose ids are invalid, a rank that refused its routing, and 1 if a
  /// room was exceeded.
  const torch::Tensor& told() const { return told_; }
  /// Throws the error of a refusal that is known by now, once: InputError, CommunicationError, CapacityError.
  void check();
  /// Whether a room was exceeded, as is known by now; it is then no refusal any more.
  bool take_exceeded();

 private:
  explicit LateRefusals(torch::Device device);

  torch::Device device_;
  torch::Tensor told_;
};

/// Waits for the current stream of each GPU on which steps have run, unless it is recorded into a graph,
/// and throws the error of a step that was refused. Of all layers of the process.
void check_late_refusals();
/// Waits as well: whether any layer's room was exceeded, which is then no refusal any more. Throws the error
/// of another refusal.
bool take_exceeded_rooms();

}  // namespace anabranch
