#include "checkpoint/state.h"

#include <anabranch/error.h>

#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "checkpoint/optimizer_state.h"

namespace anabranch {
namespace {

constexpr const char* kOptimizerPrefix = "optimizer.";

}  // namespace

bool is_optimizer_tensor(const std::string& name) { return name.starts_with(kOptimizerPrefix); }

std::vector<ParallelParameter> model_tensors(const torch::nn::Module& model,
                                             const ParallelGroups& groups) {
  auto tensors = parallel_parameters(model, groups);
  for (const auto& buffer : model.named_buffers()) {
    if (buffer.value().defined()) tensors.push_back({buffer.key(), buffer.value()});
  }
  for (const auto& tensor : tensors) {
    if (is_optimizer_tensor(tensor.name)) {
      throw CheckpointError("the model's tensor '" + tensor.name + "' has a name of the optimizer");
    }
  }
  return tensors;
}

std::vector<ParallelParameter> with_state(std::vector<ParallelParameter> tensors,
                                          const ParallelOptimizer& optimizer) {
  for (auto& tensor : optimizer.state()) tensors.push_back(std::move(tensor));
  return tensors;
}

std::vector<OptimizedParameter> optimized_parameters(const torch::optim::Optimizer& optimizer,
                                                     const torch::nn::Module& model) {
  std::unordered_map<const c10::TensorImpl*, ParallelParameter> known;
  std::unordered_set<const c10::TensorImpl*> seen;
  for (auto& parameter : parallel_parameters(model)) {
    known.emplace(parameter.tensor.unsafeGetTensorImpl(), std::move(parameter));
  }
  std::vector<OptimizedParameter> optimized;
  for (const auto& group : optimizer.param_groups()) {
    for (const auto& tensor : group.params()) {
      const auto found = known.find(tensor.unsafeGetTensorImpl());
      if (found == known.end()) {
        throw CheckpointError(c10::str("the optimizer updates a tensor of shape ", tensor.sizes(),
                                       " that is no parameter of the model"));
      }
      if (!seen.insert(tensor.unsafeGetTensorImpl()).second) {
        throw CheckpointError("the optimizer updates '" + found->second.name + "' twice");
      }
      optimized.push_back({found->second, &group.options()});
    }
  }
  return optimized;
}

ParallelParameter optimizer_tensor(const std::string& slot, const ParallelParameter& parameter,
                                   torch::Tensor tensor) {
  const auto name = kOptimizerPrefix + slot + "." + parameter.name;
  if (slot == kStep) return {name, std::move(tensor)};
  ParallelParameter state = parameter;  // lies as it does
  state.name = name;
  state.tensor = std::move(tensor);
  state.main_grad.reset();
  state.owner = -1;
  return state;
}

std::string expert_name(const std::string& name, int64_t expert) {
  const auto dot = name.rfind('.');
  const auto start = dot == std::string::npos ? 0 : dot + 1;
  return name.substr(0, start) + std::to_string(expert) + "." + name.substr(start);
}

}  // namespace anabranch
