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

ExpertPlacement ParallelParameter::placement_over(int64_t ranks) const {
  return placement != nullptr ? *placement : ExpertPlacement{num_experts, ranks};
}

HeldExpert ParallelParameter::held(int64_t local) const {
  const int64_t place = first_place + local;
  if (placement == nullptr) {
    return {place};
  }
  const int64_t rank = placement->rank_of(place);
  return placement->at(rank, place - placement->first_place(rank));
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
        parameter.first_place = experts->first_place();
        parameter.num_experts = experts->num_experts();
        parameter.placement = experts->placement();
        parameter.cut = experts->cut_of(item.key());
      }
    }
  });
  return parameters;
}

void check_placement(const ParallelParameter& parameter, const ParallelGroups& groups) {
  if (!parameter.is_expert) return;
  const int64_t rank = groups.expert_parallel->rank();
  const int64_t ranks = groups.expert_parallel->size();
  const char* doubt = ": was the model built over another communicator?";
  check_input(parameter.placement == nullptr || parameter.placement->num_ranks == ranks,
              parameter.name, " is placed over another number of ranks than the ", ranks,
              " of this expert-parallel group", doubt);
  const ExpertPlacement placement = parameter.placement_over(ranks);
  const int64_t first = placement.first_place(rank);
  const int64_t local = placement.local_experts(rank);
  check_input(parameter.first_place == first && parameter.tensor.size(0) == local, parameter.name,
              " holds experts [", parameter.first_place, ", ",
              parameter.first_place + parameter.tensor.size(0), ") of ", placement.num_places(),
              ", but rank ", rank, " of an expert-parallel group of ", ranks, " holds [", first,
              ", ", first + local, ")", doubt);
}

std::vector<ParallelParameter> parallel_parameters(const torch::nn::Module& model,
                                                   const ParallelGroups& groups) {
  auto parameters = parallel_parameters(model);
  for (const auto& parameter : parameters) check_placement(parameter, groups);
  return parameters;
}

}  // namespace anabranch
