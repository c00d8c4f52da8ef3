#pragma once

#include <anabranch/gradients.h>
#include <anabranch/optimizers.h>

#include <map>
#include <string>
#include <vector>

#include "support/sharded_model.h"
#include "support/world.h"

namespace anabranch::test {

constexpr int64_t kSteps = 4;
constexpr double kRate = 0.01;

/// Sizes that divide the world's.
inline std::vector<int> expert_parallel_sizes() {
  std::vector<int> sizes;
  for (int size = 1; size <= world()->size(); ++size) {
    if (world()->size() % size == 0) sizes.push_back(size);
  }
  return sizes;
}

/// A model on this rank of a group, and what an optimizer is made of.
struct OptimizerCase {
  OptimizerCase(const ShardedModel::Options& options, const Communicator& expert_parallel,
                const ParallelGroups& groups)
      : model(make_sharded_model(options, expert_parallel, test_seed())),
        parameters(trained_parameters(*model, groups)) {}

  /// Gradients of step `step`, of the whole model's.
  void set_gradients(int64_t step) {
    model->set_gradients(test_seed() + static_cast<uint64_t>(step));
    accumulate_gradients(parameters);
  }

  std::shared_ptr<ShardedModel> model;
  std::vector<ParallelParameter> parameters;
};

inline torch::Tensor scale_of(double value) {
  return torch::full({}, value, torch::dtype(torch::kFloat64).device(device()));
}

inline std::map<std::string, torch::Tensor> named(const std::vector<ParallelParameter>& tensors) {
  std::map<std::string, torch::Tensor> found;
  for (const auto& tensor : tensors) found.emplace(tensor.name, tensor.tensor);
  return found;
}

}  // namespace anabranch::test
