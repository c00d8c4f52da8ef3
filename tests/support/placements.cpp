#include "support/placements.h"

#include <algorithm>
#include <stdexcept>

namespace anabranch::test {
namespace {

bool ends_with(const std::string& name, const std::string& end) {
  return name.size() >= end.size() && name.compare(name.size() - end.size(), end.size(), end) == 0;
}

/// Where a slice's numbers lie in a parameter of the whole expert.
struct Place {
  Place(const std::string& name, const HeldExpert& held, int64_t hidden, bool glu) {
    units = torch::arange(hidden * held.slice / held.slices,
                          hidden * (held.slice + 1) / held.slices, torch::kLong);
    if (ends_with(name, "down_weight")) {
      dimension = 1;
    } else if (ends_with(name, "down_bias")) {
      dimension = 0;
      units.reset();
      nothing = held.slice > 0;
    } else if (glu) {
      units = torch::cat({units, units + hidden});
    }
  }
  torch::Tensor units;  // of the hidden dimension; undefined: all
  int64_t dimension = 0;
  bool nothing = false;  // is the slice's
};

torch::Tensor part_of_expert(const torch::Tensor& whole, const Place& place) {
  if (place.nothing) return torch::zeros_like(whole);
  return place.units.defined() ? whole.index_select(place.dimension, place.units.to(whole.device()))
                               : whole;
}

}  // namespace

ExpertPlacement random_placement(Random& random, int64_t num_experts, int64_t num_ranks,
                                 int64_t hidden) {
  if (num_ranks > num_experts && num_ranks <= hidden && random.chance()) {
    return ExpertPlacement::sliced(num_experts, num_ranks);
  }
  std::vector<int64_t> fitting;
  for (int64_t slices = 1; slices <= std::min(num_ranks, hidden); ++slices) {
    if (hidden % slices == 0) fitting.push_back(slices);
  }
  const int64_t slices = random.pick(fitting);
  ExpertPlacement placement{num_experts, num_ranks};
  placement.held.resize(static_cast<size_t>(num_ranks));
  const auto order = random.permutation(num_experts);
  for (int64_t i = 0; i < num_experts; ++i) {
    const auto ranks = random.permutation(num_ranks);
    for (int64_t slice = 0; slice < slices; ++slice) {
      placement.held[ranks[slice].item<int64_t>()].push_back(
          {order[i].item<int64_t>(), slice, slices});
    }
  }
  return placement;
}

torch::Tensor part_of(const torch::Tensor& whole, const std::string& name,
                      const ExpertPlacement& placement, int64_t rank, int64_t hidden, bool glu) {
  std::vector<torch::Tensor> parts;
  for (int64_t local = 0; local < placement.local_experts(rank); ++local) {
    const HeldExpert held = placement.at(rank, local);
    parts.push_back(part_of_expert(whole[held.expert], {name, held, hidden, glu}));
  }
  return parts.empty() ? whole.narrow(0, 0, 0) : torch::stack(parts);
}

void add_part(torch::Tensor& whole, const torch::Tensor& part, const std::string& name,
              const ExpertPlacement& placement, int64_t rank, int64_t hidden, bool glu) {
  if (part.size(0) != placement.local_experts(rank)) {
    throw std::runtime_error(name + " holds another number of experts than it is to");
  }
  for (int64_t local = 0; local < part.size(0); ++local) {
    const HeldExpert held = placement.at(rank, local);
    const Place place(name, held, hidden, glu);
    auto expert = whole[held.expert];
    if (place.units.defined()) {
      expert.index_add_(place.dimension, place.units, part[local]);
    } else {
      expert.add_(part[local]);  // of slices that have nothing of it, zeros
    }
  }
}

}  // namespace anabranch::test
