#include <ATen/ops/softplus.h>
#include <ATen/ops/stack.h>
#include <anabranch/router.h>

#include <cmath>
#include <limits>

#include "routing/gate.h"
#include "routing/noisy_top_k.h"
#include "routing/route.h"
#include "routing/rule.h"
#include "support/check.h"
#include "support/initialize.h"
#include "support/stage.h"

namespace anabranch {
namespace {

/// fp32, or fp64 where the layer computes in fp64.
torch::Dtype gate_type(torch::Dtype dtype) {
  return dtype == torch::kFloat64 ? torch::kFloat64 : torch::kFloat32;
}

Routing noisy_top_k(const torch::Tensor& x, const RouterParameters& parameters,
                    const MoEOptions& options, bool training) {
  const auto rule = routing_rule(options);
  if (!training) {
    auto routing = route_rows(x, parameters.weight, rule, {});
    routing.importance = weights_per_expert(routing, options.num_experts);
    routing.smooth_load = routing.counts.to(parameters.weight.scalar_type());
    return routing;
  }
  const auto logits = gate_logits(x, parameters.weight);
  const auto deviation = torch::softplus(gate_logits(x, parameters.noise_weight)) + kLeastDeviation;
  const auto noisy = logits + torch::randn_like(logits) * deviation;
  auto routing = route(noisy, rule);
  routing.importance = weights_per_expert(routing, options.num_experts);
  routing.smooth_load = smooth_load(logits, noisy, deviation, routing.expert_ids);
  return routing;
}

Routing gshard(const torch::Tensor& x, const torch::Tensor& weight, const MoEOptions& options,
               bool training) {
  auto routing = route_rows(x, weight, routing_rule(options), {});
  const auto second = routing.expert_ids.select(1, 1);
  const auto count = [&](const torch::Tensor& of_token) {
    return torch::zeros_like(routing.counts).scatter_add_(0, second, of_token);
  };
  routing.first_counts = routing.counts - count(torch::ones_like(second));
  if (training) {
    const auto weight = routing.weights.detach().select(1, 1);  // times the scale
    const auto taken = torch::rand_like(weight) * options.routing_scale < 2 * weight;
    const auto kept = torch::stack({torch::ones_like(taken), taken}, 1);
    routing.counts = routing.first_counts + count(taken.to(torch::kInt64));
    routing.expert_ids = routing.expert_ids.masked_fill(~kept, -1);
    routing.weights = routing.weights.masked_fill(~kept, 0);
    routing.may_skip = true;
  }
  return routing;
}

}  // namespace

RouterImpl::RouterImpl(const MoEOptions& options) : options_(options) {
  weight = register_parameter(
      "weight", torch::empty({options.num_experts, options.hidden_size},
                             torch::dtype(gate_type(options.dtype)).device(options.device)));
  constexpr uint64_t kStream = std::numeric_limits<uint64_t>::max();  // apart from the experts'
  fill_uniform(weight, options.hidden_size, options.seed, kStream);
  if (options.gate == Gate::kNoisyTopK) {
    noise_weight = register_parameter("noise_weight", torch::zeros_like(weight));
  }
  if (options.expert_bias) {
    expert_bias = register_buffer(
        "expert_bias", torch::zeros({options.num_experts}, weight.options().requires_grad(false)));
  }
}

void RouterImpl::to(torch::Device device, torch::Dtype dtype, bool non_blocking) {
  Module::to(device, gate_type(dtype), non_blocking);
}

void RouterImpl::to(torch::Dtype dtype, bool non_blocking) {
  Module::to(gate_type(dtype), non_blocking);
}

Routing RouterImpl::forward(const torch::Tensor& x) {
  return route_tokens(x, router_parameters(), options_, is_training());
}

void RouterImpl::update_expert_bias(const torch::Tensor& expert_load, double rate) {
  anabranch::update_expert_bias(expert_bias, expert_load, rate);
}

Routing route_tokens(const torch::Tensor& x, const RouterParameters& parameters,
                     const MoEOptions& options, bool training) {
  const Stage named("anabranch.route");
  const torch::Tensor& weight = parameters.weight;
  check_input(x.defined(), "router: x is undefined");
  check_input(x.dim() == 2 && x.size(1) == weight.size(1), "router: x is ", x.sizes(),
              ", expected [T, ", weight.size(1), "]");
  check_input(x.is_floating_point() && x.device() == weight.device(), "router: x is ",
              x.scalar_type(), " on ", x.device(), ", expected a floating type on ",
              weight.device());
  torch::Tensor gate_input = x;
  if (training && options.jitter > 0) {
    gate_input = x.to(weight.scalar_type());
    gate_input =
        gate_input * torch::empty_like(gate_input).uniform_(1 - options.jitter, 1 + options.jitter);
  }
  switch (options.gate) {
    case Gate::kTopK:
      break;
    case Gate::kNoisyTopK:
      return noisy_top_k(gate_input, parameters, options, training);
    case Gate::kGShard:
      return gshard(gate_input, weight, options, training);
  }
  return route_rows(gate_input, weight, routing_rule(options), parameters.expert_bias);
}

void update_expert_bias(torch::Tensor& expert_bias, const torch::Tensor& expert_load, double rate) {
  check_input(expert_bias.defined(), "update_expert_bias: the router has no bias of its experts");
  check_input(expert_load.defined() && expert_load.sizes() == expert_bias.sizes(),
              "update_expert_bias: the load is ",
              expert_load.defined() ? expert_load.sizes() : at::IntArrayRef(), ", expected ",
              expert_bias.sizes());
  check_input(std::isfinite(rate) && rate >= 0, "update_expert_bias: rate = ", rate,
              ", expected 0 or more");
  const torch::NoGradGuard no_grad;
  const auto load = expert_load.to(expert_bias.device(), torch::kFloat64);
  expert_bias.add_((load.mean() - load).sign().to(expert_bias.scalar_type()), rate);
}

}  // namespace anabranch
