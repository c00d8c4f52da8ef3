#include "parameters.h"

#include <algorithm>

#include "experts/latent.h"
#include "experts/shared_expert.h"
#include "moe_options.h"
#include "support/check.h"

namespace anabranch::operators {

std::vector<NamedParameter> named_parameters(MoEParameters& parameters, const MoEOptions& options) {
  auto& [router, experts, main_grad, shared, shared_main_grad, shared_gate, latent_down,
         latent_up] = parameters;
  std::vector<NamedParameter> all = {{"router.weight", &router.weight}};
  all.reserve(14);  // the most there are
  if (options.gate == Gate::kNoisyTopK) {
    all.push_back({"router.noise_weight", &router.noise_weight});
  }
  if (options.expert_bias) {
    all.push_back({"router.expert_bias", &router.expert_bias});
  }
  all.push_back({"experts.up_weight", &experts.up.weight, /*is_expert=*/true});
  all.push_back({"experts.down_weight", &experts.down.weight, /*is_expert=*/true});
  if (options.bias) {
    all.push_back({"experts.up_bias", &experts.up.bias, /*is_expert=*/true});
    all.push_back({"experts.down_bias", &experts.down.bias, /*is_expert=*/true});
  }
  if (options.shared_expert_hidden_size > 0) {
    all.push_back({"shared_expert.up_weight", &shared.up.weight});
    all.push_back({"shared_expert.down_weight", &shared.down.weight});
    if (options.bias) {
      all.push_back({"shared_expert.up_bias", &shared.up.bias});
      all.push_back({"shared_expert.down_bias", &shared.down.bias});
    }
  }
  if (options.shared_expert_gate) {
    all.push_back({"shared_expert_gate", &shared_gate});
  }
  if (options.latent_size > 0) {
    all.push_back({"latent_down", &latent_down});
    all.push_back({"latent_up", &latent_up});
  }
  return all;
}

size_t num_router_tensors(at::TensorList list) {
  const auto up_weight =
      std::find_if(list.begin(), list.end(), [](const auto& tensor) { return tensor.dim() == 3; });
  check_input(up_weight != list.end(), "parameters: there is none of three dimensions");
  return static_cast<size_t>(up_weight - list.begin());
}

MoEParameters parameters_from_list(at::TensorList list, const MoEOptions& options) {
  MoEParameters parameters;
  auto named = named_parameters(parameters, options);
  if (num_router_tensors(list) == 0) {
    std::erase_if(named, [](const auto& each) { return each.name.starts_with("router."); });
  }
  check_input(list.size() == named.size(), "parameters: got ", list.size(), ", expected ",
              named.size(), " for these options");
  for (size_t i = 0; i < named.size(); ++i) {
    *named[i].tensor = list[i];
  }
  return parameters;
}

std::vector<torch::Tensor> initial_parameters(const MoEOptions& options, int64_t rank,
                                              int64_t num_ranks) {
  checked(options);
  check_input(rank >= 0 && rank < num_ranks, "initial_parameters: rank ", rank, " of ", num_ranks);
  MoEParameters parameters;
  parameters.router = Router(options)->router_parameters();
  parameters.experts = Experts(options, placement_of(options, num_ranks), rank)->projections();
  if (options.shared_expert_hidden_size > 0) {
    parameters.shared_expert = make_shared_expert(options)->projections();
  }
  if (options.shared_expert_gate) {
    parameters.shared_expert_gate = make_shared_expert_gate(options);
  }
  if (options.latent_size > 0) {
    const auto [down, up] = make_latent_projections(options);
    parameters.latent_down = down;
    parameters.latent_up = up;
  }
  std::vector<torch::Tensor> list;
  for (const auto& parameter : named_parameters(parameters, options)) {
    list.push_back(parameter.tensor->detach());
  }
  return list;
}

}  // namespace anabranch::operators
