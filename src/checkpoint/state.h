#pragma once

#include <anabranch/optimizers.h>
#include <anabranch/parameters.h>
#include <torch/optim/optimizer.h>

#include <string>
#include <vector>

namespace anabranch {

// What a checkpoint of a model and its optimizer consists of, and under which names.

/// Parameters and buffers. Throws if a name could be taken for the optimizer's.
std::vector<ParallelParameter> model_tensors(const torch::nn::Module& model,
                                             const ParallelGroups& groups);

/// And what an optimizer of this library's keeps of them.
std::vector<ParallelParameter> with_state(std::vector<ParallelParameter> tensors,
                                          const ParallelOptimizer& optimizer);

/// A parameter of the model that the optimizer updates.
struct OptimizedParameter {
  ParallelParameter parameter;
  const torch::optim::OptimizerOptions* options = nullptr;  ///< of its group; never null
};

/// In the optimizer's order. Throws if one is not the model's, or is there twice.
std::vector<OptimizedParameter> optimized_parameters(const torch::optim::Optimizer& optimizer,
                                                     const torch::nn::Module& model);

/// One tensor of an optimizer's state for `parameter`: lies over the ranks as the parameter does,
/// but for the step, which all experts share. Its name is `optimizer.<slot>.<parameter's name>`.
ParallelParameter optimizer_tensor(const std::string& slot, const ParallelParameter& parameter,
                                   torch::Tensor tensor);
bool is_optimizer_tensor(const std::string& name);

/// `blocks.0.experts.up_weight`, expert 3 → `blocks.0.experts.3.up_weight`.
std::string expert_name(const std::string& name, int64_t expert);

}  // namespace anabranch
