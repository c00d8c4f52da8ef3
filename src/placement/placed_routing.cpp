#include "placement/placed_routing.h"

#include <ATen/ops/full.h>
#include <ATen/ops/where.h>

namespace anabranch {

PlacedRouting::PlacedRouting(const ExpertPlacement& placement)
    : num_experts_(placement.num_experts), slots_(placement.most_slices()) {
  places_ = at::full({num_experts_ + 1, slots_}, -1, at::kLong);
  auto* places = places_.mutable_data_ptr<int64_t>();
  int64_t place = 0;
  for (const auto& [expert, slice, slices] : placement.all()) {
    places[expert * slots_ + slice] = place++;
    may_skip_ = may_skip_ || slices < slots_;
  }
  first_slices_ = places_.narrow(0, 0, num_experts_).select(1, 0).contiguous();
}

const torch::Tensor& PlacedRouting::on(torch::Device device, torch::Tensor& table) const {
  if (table.device() != device) {
    table = table.to(device);
  }
  return table;
}

torch::Tensor PlacedRouting::ids(const torch::Tensor& expert_ids, bool may_skip) const {
  const auto experts =
      may_skip ? at::where(expert_ids < 0, num_experts_, expert_ids).clamp_max_(num_experts_)
               : expert_ids.clamp(0, num_experts_ - 1);
  return on(expert_ids.device(), places_)
      .index_select(0, experts.flatten())
      .view({expert_ids.size(0), expert_ids.size(1) * slots_});
}

torch::Tensor PlacedRouting::weights(const torch::Tensor& of_choices) const {
  if (slots_ == 1) {
    return of_choices;
  }
  return of_choices.unsqueeze(2)
      .expand({-1, -1, slots_})
      .reshape({of_choices.size(0), of_choices.size(1) * slots_});
}

torch::Tensor PlacedRouting::counts_of_experts(const torch::Tensor& counts) const {
  return counts.index_select(0, on(counts.device(), first_slices_));
}

}  // namespace anabranch
