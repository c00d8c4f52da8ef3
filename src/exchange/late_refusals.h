#pragma once

#include <torch/types.h>

#include <memory>

namespace anabranch {

/// Routings that a GPU found invalid when the call that was given them had returned. One mailbox for each
/// exchange, in memory that both see: a step writes into it, see LateRefusal, nobody waits.
class LateRefusals {
 public:
  /// For steps on `device`, a GPU.
  static std::shared_ptr<LateRefusals> make(torch::Device device);

  torch::Device device() const { return device_; }
  /// [2] int64 in pinned memory, −1 where there is nothing to tell.
  const torch::Tensor& told() const { return told_; }
  /// Throws the InputError of a refusal that is known by now, once.
  void check();

 private:
  explicit LateRefusals(torch::Device device);

  torch::Device device_;
  torch::Tensor told_;
};

/// Waits for the current stream of each GPU on which steps have run, unless it is recorded into a graph,
/// and throws the InputError of a step that was refused. Of all layers of the process.
void check_late_refusals();

}  // namespace anabranch
