#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <anabranch/experts.h>

#include "placement/slices.h"
#include "support/check.h"
#include "support/initialize.h"

namespace anabranch {
namespace {

enum Stream : uint64_t { kUpWeight, kUpBias, kDownWeight, kDownBias, kStreams };

/// The numbers of an expert are the same in whatever slices it is held.
void fill_slice(const torch::Tensor& parameter, const HeldExpert& held, const SliceCut& cut,
                int64_t fan_in, uint64_t seed, uint64_t stream) {
  if (held.slices == 1 || parameter.is_meta()) {
    fill_uniform(parameter, fan_in, seed, stream);
    return;
  }
  const torch::NoGradGuard no_grad;
  const auto whole =
      torch::empty(whole_sizes(parameter.sizes(), cut), parameter.options().device(torch::kCPU));
  fill_uniform(whole, fan_in, seed, stream);
  copy_slice(parameter, whole, held, cut);
}

}  // namespace

ExpertsImpl::ExpertsImpl(const MoEOptions& options, const ExpertPlacement& placement, int64_t rank,
                         bool sharded)
    : num_experts_(placement.num_experts),
      sharded_(sharded),
      glu_(options.glu),
      whole_width_(options.expert_hidden_size) {
  check_placement(placement);
  check_slices(placement, options.expert_hidden_size);
  first_place_ = placement.first_place(rank);
  if (!placement.is_blocks()) {
    placement_ = std::make_shared<ExpertPlacement>(placement);
  }
  std::vector<HeldExpert> held;
  for (int64_t local = 0; local < placement.local_experts(rank); ++local) {
    held.push_back(placement.at(rank, local));
  }
  add(options, held);
}

void ExpertsImpl::add(const MoEOptions& options, const std::vector<HeldExpert>& held) {
  const auto local = static_cast<int64_t>(held.size());
  const int64_t hidden = options.latent_size > 0 ? options.latent_size : options.hidden_size;
  const int64_t whole = options.expert_hidden_size;
  const int64_t inner = held.empty() ? whole : slice_width(whole, held.front());
  const int64_t up = options.glu ? 2 * inner : inner;
  const auto tensor_options = torch::TensorOptions().dtype(options.dtype).device(options.device);
  const auto make = [&](const char* name, at::IntArrayRef sizes, int64_t fan_in, Stream stream) {
    const SliceCut cut = cut_of(name);
    auto parameter = register_parameter(name, torch::empty(sizes, tensor_options));
    // Numbers are drawn on the host: billions of them, in a large model.
    at::parallel_for(0, local, 1, [&](int64_t begin, int64_t end) {
      for (int64_t e = begin; e < end; ++e) {
        fill_slice(parameter[e], held[e], cut, fan_in, options.seed,
                   held[e].expert * kStreams + stream);
      }
    });
    return parameter;
  };
  up_weight = make("up_weight", {local, up, hidden}, hidden, kUpWeight);
  down_weight = make("down_weight", {local, hidden, inner}, whole, kDownWeight);
  if (options.bias) {
    up_bias = make("up_bias", {local, up}, hidden, kUpBias);
    down_bias = make("down_bias", {local, hidden}, whole, kDownBias);
  }
}

void ExpertsImpl::place(const ExpertPlacement& placement) {
  check_placement(placement);
  bool same = placement_ != nullptr && placement.num_experts == placement_->num_experts &&
              placement.num_ranks == placement_->num_ranks;
  for (int64_t rank = 0; same && rank < placement.num_ranks; ++rank) {
    same = placement.local_experts(rank) == placement_->local_experts(rank);
  }
  check_input(same && placement.most_slices() == 1 && placement_->most_slices() == 1,
              "place: ", placement.describe(), " in the place of ",
              placement_ == nullptr ? "blocks" : placement_->describe(),
              ", expected as many whole experts on each rank");
  *placement_ = placement;
}

SliceCut ExpertsImpl::cut_of(std::string_view name) const {
  return anabranch::cut_of(name, glu_, whole_width_);
}

void ExpertsImpl::to(torch::Device device, torch::Dtype dtype, bool non_blocking) {
  Module::to(device, dtype, non_blocking);
  move_main_grad(non_blocking);
}

void ExpertsImpl::to(torch::Dtype dtype, bool non_blocking) {
  Module::to(dtype, non_blocking);
  move_main_grad(non_blocking);
}

void ExpertsImpl::to(torch::Device device, bool non_blocking) {
  Module::to(device, non_blocking);
  move_main_grad(non_blocking);
}

void ExpertsImpl::move_main_grad(bool non_blocking) {
  const auto type = at::toOpMathType(up_weight.scalar_type());
  for (auto* sum : {&main_grad.up, &main_grad.down}) {
    if (sum->defined()) {
      *sum = sum->to(up_weight.device(), type, non_blocking);
    }
  }
}

}  // namespace anabranch
