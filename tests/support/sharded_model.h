#pragma once

#include <anabranch/experts.h>
#include <anabranch/parameters.h>
#include <torch/nn/modules/linear.h>

#include <functional>
#include <memory>
#include <string>

#include "support/devices.h"
#include "support/random.h"

namespace anabranch::test {

/// A model with one of everything that parameters and checkpoints have to tell apart: replicated
/// parameters, sharded experts (many, and a single one), a shared expert, a frozen and a tied
/// parameter, buffers. Its numbers come from a seed and are those of the same model on one rank.
class ShardedModel : public torch::nn::Module {
 public:
  struct Options {
    int64_t num_experts = 5;
    int64_t hidden_size = 6;
    torch::Dtype dtype = torch::kFloat32;
    torch::Device device = test::device();
  };

  ShardedModel(const Options& options, int64_t ranks, int64_t rank, uint64_t seed);

  /// New parameters and buffers from a seed.
  void fill(uint64_t seed);
  /// Gradients from a seed for all that is trained. With `holes`, some stay undefined.
  void set_gradients(uint64_t seed, bool holes = false);

  /// Shape of a parameter on a single rank.
  std::vector<int64_t> whole_sizes(const std::string& name, const torch::Tensor& parameter) const;
  /// This rank's part of a whole parameter.
  torch::Tensor part(const std::string& name, const torch::Tensor& whole) const;

 private:
  /// The module that holds the parameter if that is sharded, or null.
  const ExpertsImpl* experts_of(const std::string& name) const;

  Experts experts_{nullptr};
  Experts single_expert_{nullptr};
};

/// On this rank of `expert_parallel`.
std::shared_ptr<ShardedModel> make_sharded_model(const ShardedModel::Options& options,
                                                 const Communicator& expert_parallel,
                                                 uint64_t seed);
/// The whole model on one rank: what all others are compared with.
std::shared_ptr<ShardedModel> make_whole_model(const ShardedModel::Options& options, uint64_t seed);

}  // namespace anabranch::test
