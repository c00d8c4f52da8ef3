#pragma once

#include <torch/optim/optimizer.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

namespace anabranch {

/// What an optimizer remembers of one parameter, by its name in PyTorch's state_dict. "step" is an
/// int64 scalar; the others have the parameter's shape.
using ParameterState = std::map<std::string, torch::Tensor>;

inline constexpr const char* kStep = "step";

/// LibTorch's optimizers keep their state in classes of their own; this is what they have in
/// common.
class OptimizerState {
 public:
  virtual ~OptimizerState() = default;
  /// "AdamW", ...
  virtual std::string kind() const = 0;
  /// What a parameter with these options has once it was updated; may be nothing.
  virtual std::vector<std::string> slots(const torch::optim::OptimizerOptions& options) const = 0;
  virtual ParameterState read(const torch::optim::OptimizerParamState& state) const = 0;
  virtual std::unique_ptr<torch::optim::OptimizerParamState> make(
      const ParameterState& state) const = 0;
};

/// For AdamW, Adam and SGD. Throws CheckpointError for another optimizer.
const OptimizerState& state_of(const torch::optim::Optimizer& optimizer);

}  // namespace anabranch
