// Experts that move between steps: where they are to lie, and their rows' way there.

#include <anabranch/expert_placement.h>
#include <torch/library.h>

#include "operators.h"
#include "options.h"
#include "moe_options.h"
#include "placement/moves.h"
#include "placement/moving_rows.h"
#include "placement/nodes.h"
#include "registry.h"
#include "support/check.h"

namespace anabranch::operators {
namespace {

std::vector<int64_t> nodes(std::string group, std::string node) {
  const auto of_ranks = nodes_of_ranks(*group_named(group), node);
  return {of_ranks.begin(), of_ranks.end()};
}

/// The text of another placement, or of that of `options`; see choose_moves.
std::string moved_placement(std::string options, std::vector<int64_t> loads,
                            std::vector<int64_t> nodes, double least_gain) {
  const auto ranks = static_cast<int64_t>(nodes.size());
  const auto placement = placement_of(options_from_json(options), ranks);
  check_input(!placement.is_blocks() && placement.most_slices() == 1,
              "ExpertMover: a layer's placement is '", placement.describe(),
              "', expected movable or lists of whole experts");
  check_input(static_cast<int64_t>(loads.size()) == placement.num_experts, "ExpertMover: loads of ",
              loads.size(), " experts, expected ", placement.num_experts);
  return choose_moves(loads, placement, {nodes.begin(), nodes.end()}, least_gain)
      .placement.describe();
}

/// Rows of `tensors`, which are of this rank's places, to where `to` says; how many experts have moved.
int64_t move_experts(std::string options, std::string to, at::TensorList tensors,
                     std::string group) {
  const auto communicator = group_named(group);
  const auto all = options_from_json(options);
  const auto from = placement_of(all, communicator->size());
  const auto next = ExpertPlacement::parse(to, all.num_experts, communicator->size());
  std::vector<int64_t> holders;
  for (int64_t place = 0; place < from.num_places(); ++place)
    holders.push_back(from.rank_of(place));
  const auto moves = moves_between(from, next, holders);
  std::vector<MovingRows> moving;
  for (const auto& tensor : tensors) {
    moving.push_back({tensor, from.first_place(communicator->rank()), moves});
  }
  move_rows(*communicator, moving);
  communicator->check();
  return moved_experts(from, next);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(anabranch, library) {
  Operators operators(library);
  operators.def("nodes_of_ranks(str group, str node) -> int[]", nodes);
  operators.def("moved_placement(str options, int[] loads, int[] nodes, float least_gain) -> str",
                moved_placement);
  operators.def("move_experts(str options, str to, Tensor(a!)[] tensors, str group) -> int",
                move_experts);
}

}  // namespace anabranch::operators
