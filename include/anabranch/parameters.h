#pragma once

#include <anabranch/communicator.h>
#include <anabranch/expert_placement.h>
#include <torch/nn/module.h>

#include <memory>
#include <string>
#include <vector>

namespace anabranch {

/// A model parameter and how it lies over the ranks.
struct ParallelParameter {
  std::string name;        ///< dotted path within the model
  torch::Tensor tensor;    ///< the parameter; an expert's has this rank's experts along dimension 0
  bool is_expert = false;  ///< sharded over the expert-parallel group; otherwise replicated
  int64_t first_place = 0;  ///< number of this rank's first place: of its first expert, in blocks
  int64_t num_experts = 0;  ///< experts over all ranks
  torch::Tensor main_grad = {};  ///< takes the place of the parameter's grad() where defined
  /// An optimizer's state that one rank alone has of those that have the parameter: that rank of the world,
  /// and `tensor` is a meta tensor elsewhere. Of an expert's state every rank has its own part, and is the
  /// owner. −1: they all have it.
  int64_t owner = -1;
  std::shared_ptr<const ExpertPlacement> placement =
      nullptr;        ///< of experts that do not lie in blocks
  SliceCut cut = {};  ///< how its slices cut an expert's part

  /// Of an expert's, over so many ranks of the expert-parallel group.
  ExpertPlacement placement_over(int64_t ranks) const;
  /// What `tensor`'s row `local` is of.
  HeldExpert held(int64_t local) const;
  /// Whether a rank may have a part of an expert.
  bool in_slices() const { return placement != nullptr && placement->most_slices() > 1; }

  /// Where its gradient is summed.
  const torch::Tensor& gradient() const { return main_grad.defined() ? main_grad : tensor.grad(); }
};

/// Expert parallelism inside data parallelism: the world's ranks in groups of `expert_parallel_size`
/// consecutive ranks, each group holding all experts once.
struct ParallelGroups {
  std::shared_ptr<Communicator> world;
  std::shared_ptr<Communicator> expert_parallel;  ///< ranks that share one set of experts
  std::shared_ptr<Communicator> expert_replicas;  ///< ranks that hold the same experts as this one
};

/// Collective over `world`. `expert_parallel_size` must divide its size; 0 means all of it.
/// Throws InputError, and CommunicationError where ranks ask for different sizes.
ParallelGroups make_parallel_groups(std::shared_ptr<Communicator> world,
                                    int64_t expert_parallel_size = 0);

/// Every parameter of `model`, in registration order; those of `Experts` modules that are sharded
/// are marked (a shared expert is replicated). A tensor registered under several names is listed
/// once, under the first.
std::vector<ParallelParameter> parallel_parameters(const torch::nn::Module& model);

/// Throws InputError if it holds other experts than `groups` gives this rank.
void check_placement(const ParallelParameter& parameter, const ParallelGroups& groups);

/// The same. Throws InputError if this rank's experts are not those that `groups` gives it.
std::vector<ParallelParameter> parallel_parameters(const torch::nn::Module& model,
                                                   const ParallelGroups& groups);

}  // namespace anabranch
