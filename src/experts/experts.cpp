#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <anabranch/experts.h>

#include "support/initialize.h"

namespace anabranch {
namespace {

enum Stream : uint64_t { kUpWeight, kUpBias, kDownWeight, kDownBias, kStreams };

}  // namespace

ExpertsImpl::ExpertsImpl(const MoEOptions& options, const ExpertPlacement& placement, int64_t rank,
                         bool sharded)
    : first_expert_(placement.first_expert(rank)),
      num_experts_(placement.num_experts),
      sharded_(sharded) {
  const int64_t local = placement.local_experts(rank);
  const int64_t hidden = options.latent_size > 0 ? options.latent_size : options.hidden_size;
  const int64_t inner = options.expert_hidden_size;
  const int64_t up = options.glu ? 2 * inner : inner;
  const auto tensor_options = torch::TensorOptions().dtype(options.dtype).device(options.device);
  const auto add = [&](const char* name, at::IntArrayRef sizes, int64_t fan_in, Stream stream) {
    auto parameter = register_parameter(name, torch::empty(sizes, tensor_options));
    // Numbers are drawn on the host: billions of them, in a large model.
    at::parallel_for(0, local, 1, [&](int64_t begin, int64_t end) {
      for (int64_t e = begin; e < end; ++e) {
        fill_uniform(parameter[e], fan_in, options.seed, (first_expert_ + e) * kStreams + stream);
      }
    });
    return parameter;
  };
  up_weight = add("up_weight", {local, up, hidden}, hidden, kUpWeight);
  down_weight = add("down_weight", {local, hidden, inner}, inner, kDownWeight);
  if (options.bias) {
    up_bias = add("up_bias", {local, up}, hidden, kUpBias);
    down_bias = add("down_bias", {local, hidden}, inner, kDownBias);
  }
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
