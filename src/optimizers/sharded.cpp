// An optimizer whose states lie over the ranks that have a parameter. See optimizers.h.

#include <ATen/ATen.h>
#include <anabranch/expert_placement.h>
#include <anabranch/optimizers.h>

#include <algorithm>
#include <utility>

#include "optimizers/share.h"

namespace anabranch {
namespace {

/// The experts of a parameter whose state this rank has.
ParallelParameter own_experts(const ParallelParameter& parameter, const Communicator& replicas) {
  const ExpertPlacement placement{parameter.tensor.size(0), replicas.size()};
  const int64_t first = placement.first_place(replicas.rank());
  const int64_t count = placement.local_experts(replicas.rank());
  ParallelParameter own = parameter;
  own.tensor = parameter.tensor.detach().narrow(0, first, count);
  own.first_place += first;
  if (parameter.main_grad.defined()) own.main_grad = parameter.main_grad.narrow(0, first, count);
  return own;
}

/// What another rank has: shapes and types alone.
std::vector<ParallelParameter> without_numbers(std::vector<ParallelParameter> parameters) {
  for (auto& parameter : parameters) {
    const auto options = parameter.tensor.options().device(at::kMeta);
    parameter.tensor = at::empty(parameter.tensor.sizes(), options);
    parameter.main_grad.reset();
  }
  return parameters;
}

class ShardedOptimizer final : public ParallelOptimizer {
 public:
  ShardedOptimizer(const std::vector<ParallelParameter>& parameters, const ParallelGroups& groups,
                   const OptimizerMaker& make)
      : groups_(groups) {
    const at::NoGradGuard no_grad;
    const auto by_rank = share_out_replicated(parameters);
    for (int rank = 0; rank < groups.world->size(); ++rank) {
      if (rank == groups.world->rank()) {
        replicated_optimizer_ = make(by_rank[rank]);
      } else {
        add_elsewhere(*make(without_numbers(by_rank[rank])), rank);
      }
    }
    expert_optimizer_ = make(share_out_experts(parameters));
  }

  void step(double learning_rate, const torch::Tensor& scale) override {
    const at::NoGradGuard no_grad;
    for (const auto& [whole, own] : experts_) {
      const auto& gradient = whole.tensor.grad();
      if (whole.main_grad.defined() || !gradient.defined()) continue;
      const int64_t first = own.first_place - whole.first_place;
      own.tensor.mutable_grad() = gradient.narrow(0, first, own.tensor.size(0));
    }
    replicated_optimizer_->step(learning_rate, scale);
    expert_optimizer_->step(learning_rate, scale);
    for (const auto& [whole, own] : experts_) own.tensor.mutable_grad().reset();
    share(replicated_, *groups_.world);
    share(expert_parts_, *groups_.expert_replicas);
  }

  std::vector<ParallelParameter> state() const override {
    auto tensors = elsewhere_;
    for (auto& tensor : replicated_optimizer_->state()) {
      tensor.owner = groups_.world->rank();
      tensors.push_back(std::move(tensor));
    }
    for (auto& tensor : expert_optimizer_->state()) {
      if (tensor.is_expert) tensor.owner = groups_.world->rank();
      tensors.push_back(std::move(tensor));
    }
    // In one order on every rank.
    std::sort(tensors.begin(), tensors.end(),
              [](const auto& a, const auto& b) { return a.name < b.name; });
    return tensors;
  }

  std::string name() const override { return expert_optimizer_->name(); }

 private:
  struct ExpertsOfRank {
    ParallelParameter whole;
    ParallelParameter own;
  };

  /// The largest first, each to the rank that has least so far.
  std::vector<std::vector<ParallelParameter>> share_out_replicated(
      const std::vector<ParallelParameter>& parameters) {
    std::vector<ParallelParameter> by_size;
    for (const auto& parameter : parameters) {
      if (!parameter.is_expert) by_size.push_back(parameter);
    }
    std::stable_sort(by_size.begin(), by_size.end(), [](const auto& a, const auto& b) {
      return a.tensor.numel() > b.tensor.numel();
    });
    std::vector<int64_t> elements(groups_.world->size());
    std::vector<std::vector<ParallelParameter>> by_rank(elements.size());
    replicated_.resize(elements.size());
    for (const auto& parameter : by_size) {
      const auto least = std::min_element(elements.begin(), elements.end()) - elements.begin();
      elements[least] += parameter.tensor.numel();
      by_rank[least].push_back(parameter);
      replicated_[least].push_back(parameter.tensor.detach());
    }
    return by_rank;
  }

  std::vector<ParallelParameter> share_out_experts(
      const std::vector<ParallelParameter>& parameters) {
    const auto& replicas = *groups_.expert_replicas;
    std::vector<ParallelParameter> own;
    expert_parts_.resize(replicas.size());
    for (const auto& parameter : parameters) {
      if (!parameter.is_expert) continue;
      experts_.push_back({parameter, own_experts(parameter, replicas)});
      own.push_back(experts_.back().own);
      const ExpertPlacement placement{parameter.tensor.size(0), replicas.size()};
      for (int rank = 0; rank < replicas.size(); ++rank) {
        expert_parts_[rank].push_back(parameter.tensor.detach().narrow(
            0, placement.first_place(rank), placement.local_experts(rank)));
      }
    }
    return own;
  }

  void add_elsewhere(const ParallelOptimizer& optimizer, int rank) {
    for (auto& tensor : optimizer.state()) {
      tensor.owner = rank;
      elsewhere_.push_back(std::move(tensor));
    }
  }

  ParallelGroups groups_;
  std::unique_ptr<ParallelOptimizer> replicated_optimizer_;  // of what this rank has of them
  std::unique_ptr<ParallelOptimizer> expert_optimizer_;
  std::vector<ParallelParameter> elsewhere_;  // states of replicated parameters on other ranks
  std::vector<ExpertsOfRank> experts_;
  std::vector<std::vector<torch::Tensor>> replicated_;    // parameters by rank of the world
  std::vector<std::vector<torch::Tensor>> expert_parts_;  // and by rank of the replicas
};

}  // namespace

std::unique_ptr<ParallelOptimizer> make_sharded_optimizer(
    const std::vector<ParallelParameter>& parameters, const ParallelGroups& groups,
    const OptimizerMaker& make) {
  return std::make_unique<ShardedOptimizer>(parameters, groups, make);
}

}  // namespace anabranch
