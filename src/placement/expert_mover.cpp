// Experts that move between steps. See expert_mover.h.

#include <anabranch/expert_mover.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <chrono>

#include "placement/holder.h"
#include "placement/moves.h"
#include "placement/moving_rows.h"
#include "placement/nodes.h"
#include "support/check.h"

namespace anabranch {
namespace {

/// Of `tensor`'s rows, [places] the rank of the world that has each.
std::vector<int64_t> holders_of(const ParallelParameter& tensor, const ExpertPlacement& placement,
                                const ParallelGroups& groups) {
  const int64_t group = groups.world->rank() / groups.expert_parallel->size();
  std::vector<int64_t> holders;
  for (int64_t rank = 0; rank < placement.num_ranks; ++rank) {
    for (int64_t local = 0; local < placement.local_experts(rank); ++local) {
      holders.push_back(holder_of(tensor, placement, rank, local, group, groups));
    }
  }
  return holders;
}

void wait_for(torch::Device device) {
  if (!device.is_cpu()) {
    c10::impl::VirtualGuardImpl(device.type()).getStream(device).synchronize();
  }
}

/// The layers of a model, in order, each once.
std::vector<std::shared_ptr<MoELayerImpl>> layers_of(torch::nn::Module& model) {
  std::vector<std::shared_ptr<MoELayerImpl>> layers;
  for (const auto& module : model.modules(/*include_self=*/false)) {
    if (auto layer = std::dynamic_pointer_cast<MoELayerImpl>(module)) {
      layers.push_back(std::move(layer));
    }
  }
  return layers;
}

}  // namespace

ExpertMover::ExpertMover(torch::nn::Module& model, const ParallelOptimizer& optimizer,
                         const ParallelGroups& groups, const ExpertMoverOptions& options)
    : model_(model),
      optimizer_(optimizer),
      groups_(groups),
      options_(options),
      layers_(layers_of(model)) {
  check_input(options.interval >= 1, "ExpertMover: interval = ", options.interval,
              ", expected at least 1");
  check_input(options.least_gain >= 0 && options.least_gain < 1,
              "ExpertMover: least_gain = ", options.least_gain, ", expected 0 ≤ least_gain < 1");
  for (const auto& layer : layers_) {
    const auto& placement = layer->exchange().placement();
    check_input(!placement.is_blocks() && placement.most_slices() == 1,
                "ExpertMover: a layer's placement is '", layer->options().placement,
                "', expected movable or lists of whole experts");
  }
  parallel_parameters(model, groups);  // refuses another communicator's
  node_of_ = nodes_of_ranks(*groups.expert_parallel, options.node);
}

bool ExpertMover::after_step(const torch::Tensor& load) {
  const at::NoGradGuard no_grad;
  const auto layers = static_cast<int64_t>(layers_.size());
  check_input(load.dim() == 2 && load.size(0) == layers && load.scalar_type() == at::kLong,
              "ExpertMover: load is ", load.scalar_type(), " ", load.sizes(), ", expected Long [",
              layers, ", experts]");
  load_ = load_.defined() ? load_ + load : load.clone();
  if (++steps_ % options_.interval != 0) {
    return false;
  }
  const auto sums = std::exchange(load_, {}).cpu();
  const int64_t moved_before = moves_.experts;
  moves_.before = moves_.after = 0;
  for (int64_t i = 0; i < layers; ++i) {
    auto& layer = *layers_[i];
    const auto of_layer = sums[i].contiguous();
    const auto* first = of_layer.const_data_ptr<int64_t>();
    const auto choice = choose_moves({first, first + of_layer.numel()},
                                     layer.exchange().placement(), node_of_, options_.least_gain);
    moves_.before += choice.before / static_cast<double>(layers);
    moves_.after += choice.after / static_cast<double>(layers);
    move(layer, choice.placement);
  }
  return moves_.experts > moved_before;
}

void ExpertMover::move(MoELayerImpl& layer, const ExpertPlacement& to) {
  const auto from = layer.exchange().placement();
  if (from.held == to.held) return;
  const auto begin = std::chrono::steady_clock::now();
  auto tensors = parallel_parameters(model_);
  for (auto& tensor : optimizer_.state()) tensors.push_back(std::move(tensor));
  std::erase_if(tensors, [&](const auto& tensor) {
    return !tensor.is_expert || tensor.placement != layer.experts()->placement();
  });
  auto& world = *groups_.world;
  std::vector<MovingRows> moving;
  for (const auto& tensor : tensors) {
    const auto& rows =
        moving.emplace_back(MovingRows{tensor.tensor, tensor.first_place,
                                       moves_between(from, to, holders_of(tensor, from, groups_))});
    const int64_t row = c10::multiply_integers(tensor.tensor.sizes().slice(1));
    const int64_t groups = tensor.owner < 0 ? groups_.expert_replicas->size() : 1;
    for (const Move& each : rows.moves) {
      const bool crosses = each.from_rank != each.to_rank;
      moves_.bytes += crosses ? groups * row * tensor.tensor.element_size() : 0;
    }
  }
  move_rows(world, moving);
  layer.place(to);
  wait_for(tensors.front().tensor.device());
  world.check();
  moves_.experts += moved_experts(from, to);
  moves_.seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

}  // namespace anabranch
