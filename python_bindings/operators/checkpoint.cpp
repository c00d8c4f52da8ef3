// Checkpoints of models and optimizers that Python holds, in the library's files.

#include <anabranch/checkpoint.h>

#include <nlohmann/json.hpp>

#include "moe_options.h"
#include "operators.h"
#include "options.h"
#include "placement/slices.h"
#include "registry.h"
#include "support/check.h"

namespace anabranch::operators {
namespace {

ParallelGroups groups_of(const std::string& world, const std::string& expert_parallel) {
  return {group_named(world), group_named(expert_parallel), nullptr};
}

/// `num_experts` 0: replicated. `layers`: the options of experts that do not lie in blocks; else "".
std::vector<ParallelParameter> parallel_tensors(const std::vector<std::string>& names,
                                                at::TensorList tensors,
                                                const std::vector<int64_t>& first_experts,
                                                const std::vector<int64_t>& num_experts,
                                                const std::vector<std::string>& layers,
                                                int64_t ranks) {
  check_input(names.size() == tensors.size() && first_experts.size() == tensors.size() &&
                  num_experts.size() == tensors.size() && layers.size() == tensors.size(),
              "checkpoint: as many names, experts and layers as tensors, got ", names.size(), ", ",
              first_experts.size(), ", ", num_experts.size(), ", ", layers.size(), " and ",
              tensors.size());
  std::vector<ParallelParameter> all;
  for (size_t i = 0; i < names.size(); ++i) {
    all.push_back({names[i], tensors[i], num_experts[i] > 0, first_experts[i], num_experts[i]});
    if (layers[i].empty()) continue;
    const auto options = options_from_json(layers[i]);
    auto& last = all.back();
    last.placement = std::make_shared<const ExpertPlacement>(placement_of(options, ranks));
    last.cut =
        cut_of(names[i].substr(names[i].rfind('.') + 1), options.glu, options.expert_hidden_size);
  }
  return all;
}

void save(std::string directory, std::vector<std::string> names, at::TensorList tensors,
          std::vector<int64_t> first_experts, std::vector<int64_t> num_experts,
          std::vector<std::string> layers, std::string optimizer, std::string metadata,
          std::string world, std::string expert_parallel) {
  const auto groups = groups_of(world, expert_parallel);
  const auto all = parallel_tensors(names, tensors, first_experts, num_experts, layers,
                                    groups.expert_parallel->size());
  save_checkpoint(directory, {all, optimizer},
                  nlohmann::json::parse(metadata).get<CheckpointMetadata>(), groups);
}

/// The index's text, the stored names, the optimizer's class, metadata as JSON.
std::tuple<std::string, std::vector<std::string>, std::string, std::string> read_index(
    std::string directory, std::string world) {
  const auto found = describe_checkpoint(directory, *group_named(world));
  return {found.index, found.names, found.optimizer, nlohmann::json(found.metadata).dump()};
}

void load(std::string directory, std::string index, std::vector<std::string> names,
          at::TensorList tensors, std::vector<int64_t> first_experts,
          std::vector<int64_t> num_experts, std::vector<std::string> layers, bool with_optimizer,
          std::string world, std::string expert_parallel) {
  const auto groups = groups_of(world, expert_parallel);
  const auto all = parallel_tensors(names, tensors, first_experts, num_experts, layers,
                                    groups.expert_parallel->size());
  load_checkpoint(directory, index, all, with_optimizer, groups);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(anabranch, library) {
  Operators operators(library);
  operators.def(
      "save_checkpoint(str directory, str[] names, Tensor[] tensors, int[] first_experts, "
      "int[] num_experts, str[] layers, str optimizer, str metadata, str world, str "
      "expert_parallel) -> ()",
      save);
  operators.def("read_checkpoint_index(str directory, str world) -> (str, str[], str, str)",
                read_index);
  operators.def(
      "load_checkpoint(str directory, str index, str[] names, Tensor(a!)[] tensors, "
      "int[] first_experts, int[] num_experts, str[] layers, bool with_optimizer, str world, "
      "str expert_parallel) -> ()",
      load);
}

}  // namespace anabranch::operators
