// Experts that move between steps. See expert_mover.h.

#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>
#include <anabranch/expert_mover.h>
#include <anabranch/rank_discovery.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <chrono>

#include "communicator/agreement.h"
#include "communicator/hierarchical/node_layout.h"
#include "placement/holder.h"
#include "placement/moves.h"
#include "support/check.h"
#include "support/sum.h"

namespace anabranch {
namespace {

/// A row that goes from one place to another.
struct Move {
  int64_t from_rank, to_rank;    ///< of the world
  int64_t from_place, to_place;  ///< over all ranks
};

std::vector<Move> moves_of(const ParallelParameter& tensor, const ExpertPlacement& from,
                           const ExpertPlacement& to, const ParallelGroups& groups) {
  const int64_t group = groups.world->rank() / groups.expert_parallel->size();
  std::vector<int64_t> holders(from.num_places());
  for (int64_t rank = 0, place = 0; rank < from.num_ranks; ++rank) {
    for (int64_t local = 0; local < from.local_experts(rank); ++local) {
      holders[place++] = holder_of(tensor, from, rank, local, group, groups);
    }
  }
  const auto before = from.place_of_experts();
  const auto after = to.place_of_experts();
  std::vector<Move> moves;
  for (int64_t expert = 0; expert < from.num_experts; ++expert) {
    const int64_t old = before[expert];
    const int64_t next = after[expert];
    if (old != next) moves.push_back({holders[old], holders[next], old, next});
  }
  // In the order in which they are sent and received.
  std::sort(moves.begin(), moves.end(),
            [](const Move& one, const Move& other) { return one.to_place < other.to_place; });
  return moves;
}

/// The rows of one tensor on their way.
class MovingRows {
 public:
  MovingRows(const ParallelParameter& tensor, const std::vector<Move>& moves, int64_t rank,
             int64_t ranks)
      : tensor_(tensor.tensor.detach()), send_rows_(ranks, 0), receive_rows_(ranks, 0) {
    std::vector<int64_t> leaving, coming;
    for (int64_t other = 0; other < ranks; ++other) {
      for (const auto& [from_rank, to_rank, from_place, to_place] : moves) {
        if (from_rank == rank && to_rank == other) {
          leaving.push_back(from_place - tensor.first_place);
          ++send_rows_[other];
        }
        if (to_rank == rank && from_rank == other) {
          coming.push_back(to_place - tensor.first_place);
          ++receive_rows_[other];
        }
      }
    }
    leaving_ = at::tensor(leaving, at::kLong).to(tensor_.device());
    coming_ = at::tensor(coming, at::kLong).to(tensor_.device());
    auto sizes = tensor_.sizes().vec();
    sizes[0] = sum(receive_rows_);
    received_ = at::empty(sizes, tensor_.options());
  }

  Transfer transfer() const {
    return {tensor_.index_select(0, leaving_), send_rows_, received_, receive_rows_};
  }
  /// When they have come.
  void put() { tensor_.index_copy_(0, coming_, received_); }

 private:
  torch::Tensor tensor_;
  std::vector<int64_t> send_rows_, receive_rows_;
  torch::Tensor leaving_, coming_;  ///< rows of it
  torch::Tensor received_;
};

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
  const NodeLayout layout(all_gather_strings(
      *groups.expert_parallel, options.node.empty() ? discover_rank().node : options.node));
  for (int rank = 0; rank < groups.expert_parallel->size(); ++rank) {
    node_of_.push_back(layout.node_of(rank));
  }
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
  std::vector<Transfer> transfers;
  for (const auto& tensor : tensors) {
    const auto moves = moves_of(tensor, from, to, groups_);
    moving.emplace_back(tensor, moves, world.rank(), world.size());
    transfers.push_back(moving.back().transfer());
    const int64_t row = c10::multiply_integers(tensor.tensor.sizes().slice(1));
    const int64_t groups = tensor.owner < 0 ? groups_.expert_replicas->size() : 1;
    for (const Move& each : moves) {
      const bool crosses = each.from_rank != each.to_rank;
      moves_.bytes += crosses ? groups * row * tensor.tensor.element_size() : 0;
    }
  }
  world.all_to_all_v(transfers);
  for (auto& rows : moving) rows.put();
  layer.place(to);
  wait_for(tensors.front().tensor.device());
  world.check();
  const auto before = from.all();
  const auto after = to.all();
  for (size_t place = 0; place < before.size(); ++place) {
    moves_.experts += before[place] == after[place] ? 0 : 1;
  }
  moves_.seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

}  // namespace anabranch
