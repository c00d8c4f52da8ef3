#include <anabranch/expert_placement.h>
#include <anabranch/experts.h>
#include <anabranch/parameters.h>

#include <unordered_set>

#include "communicator/agreement.h"
#include "support/check.h"

namespace anabranch {

ParallelGroups make_parallel_groups(std::shared_ptr<Communicator> world,
                                    int64_t expert_parallel_size) {
  check_input(world != nullptr, "make_parallel_groups: no world communicator");
  check_agreement(*world, {{"expert_parallel_size", std::to_string(expert_parallel_size)}});
  const int64_t size = expert_parallel_size == 0 ? world->size() : expert_parallel_size;
  check_input(size > 0 && world->size() % size == 0, "expert_parallel_size must divide the ",
              world->size(), " ranks of the world, got ", expert_parallel_size);
  const int group = static_cast<int>(world->rank() / size);
  const int place = static_cast<int>(world->rank() % size);
  ParallelGroups groups;
  groups.expert_parallel = world->split(group, world->rank());
  groups.expert_replicas = world->split(place, world->rank());
  groups.world = std::move(world);
  return groups;
}

std::vector<ParallelParameter> parallel_parameters(const torch::nn::Module& model) {
  std::vector<ParallelParameter> parameters;
  std::unordered_set<const c10::TensorImpl*> seen;
  model.apply([&](const std::string& path, const torch::nn::Module& module) {
    const auto* experts = dynamic_cast<const ExpertsImpl*>(&module);
    for (const auto& item : module.named_parameters(/*recurse=*/false)) {
      if (!seen.insert(item.value().unsafeGetTensorImpl()).second) continue;
      auto& parameter = parameters.emplace_back();
      parameter.name = path.empty() ? item.key() : path + "." + item.key();
      parameter.tensor = item.value();
      if (experts != nullptr) {
        const bool up = parameter.tensor.is_same(experts->up_weight);
        const bool down = parameter.tensor.is_same(experts->down_weight);
        parameter.main_grad = up     ? experts->main_grad.up
                              : down ? experts->main_grad.down
                                     : torch::Tensor();
      }
      if (experts != nullptr && experts->sharded()) {
        parameter.is_expert = true;
        parameter.first_expert = experts->first_expert();
        parameter.num_experts = experts->num_experts();
      }
    }
  });
  return parameters;
}

void check_placement(const ParallelParameter& parameter, const ParallelGroups& groups) {
  if (!parameter.is_expert) return;
  const int64_t rank = groups.expert_parallel->rank();
  const ExpertPlacement placement{parameter.num_experts, groups.expert_parallel->size()};
  const int64_t first = placement.first_expert(rank);
  const int64_t local = placement.local_experts(rank);
  check_input(parameter.first_expert == first && parameter.tensor.size(0) == local, parameter.name,
              " holds experts [", parameter.first_expert, ", ",
              parameter.first_expert + parameter.tensor.size(0), ") of ", parameter.num_experts,
              ", but rank ", rank, " of an expert-parallel group of ", placement.num_ranks,
              " holds [", first, ", ", first + local,
              "): was the model built over another communicator?");
}

std::vector<ParallelParameter> parallel_parameters(const torch::nn::Module& model,
                                                   const ParallelGroups& groups) {
  auto parameters = parallel_parameters(model);
  for (const auto& parameter : parameters) check_placement(parameter, groups);
  return parameters;
}

}  // namespace anabranch
