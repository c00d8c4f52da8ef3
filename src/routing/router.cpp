#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/softplus.h>
#include <ATen/ops/stack.h>
#include <anabranch/router.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "kernels/routing.h"
#include "routing/gate.h"
#include "routing/noisy_top_k.h"
#include "routing/route.h"
#include "routing/rule.h"
#include "routing/topology_gate.h"
#include "support/check.h"
#include "support/initialize.h"
#include "support/stage.h"

namespace anabranch {
namespace {

/// fp32, or fp64 where the layer computes in fp64.
torch::Dtype gate_type(torch::Dtype dtype) {
  return dtype == torch::kFloat64 ? torch::kFloat64 : torch::kFloat32;
}

torch::Tensor contiguous_or_none(const torch::Tensor& tensor) {
  return tensor.defined() ? tensor.contiguous() : tensor;
}

Routing noisy_top_k(const torch::Tensor& x, const RouterParameters& parameters,
                    const MoEOptions& options, bool training, const RoutingConditions& conditions) {
  const auto rule = routing_rule(options);
  if (!training) {
    auto routing = route_rows(x, parameters.weight, rule, conditions);
    routing.importance = weights_per_expert(routing, options.num_experts);
    routing.smooth_load = routing.counts.to(parameters.weight.scalar_type());
    return routing;
  }
  const auto logits = gate_logits(x, parameters.weight);
  const auto deviation = torch::softplus(gate_logits(x, parameters.noise_weight)) + kLeastDeviation;
  const auto noisy = logits + torch::randn_like(logits) * deviation;
  auto routing = route(noisy, rule, conditions);
  routing.importance = weights_per_expert(routing, options.num_experts);
  routing.smooth_load =
      smooth_load(logits, noisy, deviation, routing.expert_ids, conditions.padding_mask);
  return routing;
}

Routing gshard(const torch::Tensor& x, const torch::Tensor& weight, const MoEOptions& options,
               bool training, const RoutingConditions& conditions) {
  auto routing = route_rows(x, weight, routing_rule(options), conditions);
  const auto second = routing.expert_ids.select(1, 1);
  const auto is_one = second >= 0;
  const auto place = second.clamp_min(0);
  const auto count = [&](const torch::Tensor& of_token) {
    return torch::zeros_like(routing.counts).scatter_add_(0, place, of_token.to(torch::kInt64));
  };
  routing.first_counts = routing.counts - count(is_one);
  if (training) {
    const auto weight = routing.weights.detach().select(1, 1);  // times the scale
    const auto taken = torch::rand_like(weight) * options.routing_scale < 2 * weight;
    const auto kept = torch::stack({torch::ones_like(taken), taken}, 1);
    routing.counts = routing.first_counts + count(taken.logical_and(is_one));
    routing.expert_ids = routing.expert_ids.masked_fill(~kept, -1);
    routing.weights = routing.weights.masked_fill(~kept, 0);
    routing.may_skip = true;
  }
  return routing;
}

Routing sinkhorn(const torch::Tensor& x, const torch::Tensor& weight, const MoEOptions& options,
                 bool training, RoutingConditions conditions) {
  const auto rule = routing_rule(options);
  if (!training || conditions.expert_ids.defined()) return route_rows(x, weight, rule, conditions);
  const auto logits = gate_logits(x, weight);
  conditions.expert_bias =
      RoutingKernels::on(logits.device())
          .sinkhorn_bias(logits.detach().contiguous(), contiguous_or_none(conditions.padding_mask));
  return route_by(Choice::kByBiasedLogits, logits, rule, conditions);
}

/// In training experts choose: [T, E] ids. A choice that is given has as many places for a token as it has.
Routing expert_choice(const torch::Tensor& x, const torch::Tensor& weight,
                      const MoEOptions& options, bool training, RoutingConditions conditions) {
  auto rule = routing_rule(options);
  const int64_t experts = options.num_experts;
  const int64_t sequences = std::max<int64_t>(conditions.sequences, 1);
  if (options.sequence_balance_coefficient == 0) conditions.sequences = 0;  // no sums are wanted
  const auto given = conditions.expert_ids;
  const bool wide = given.defined() ? given.dim() == 2 && given.size(1) == experts : training;
  if (!wide) {
    if (given.defined() && given.dim() == 2) rule.top_k = std::min(given.size(1), experts);
    return route_rows(x, weight, rule, conditions);
  }
  const auto logits = gate_logits(x, weight);
  const auto own = training
                       ? RoutingKernels::on(logits.device())
                             .choose_tokens(logits.detach().contiguous(), rule,
                                            contiguous_or_none(conditions.padding_mask), sequences)
                       : at::constant_pad_nd(std::get<1>(logits.detach().topk(rule.top_k, 1)),
                                             {0, experts - rule.top_k}, -1);
  rule.top_k = experts;
  if (given.defined()) {
    conditions.expert_ids = given.where(given.narrow(1, 0, 1).ne(kOwnChoice), own);
    return route(logits, rule, conditions);
  }
  conditions.expert_ids = own;
  return route_by(Choice::kMade, logits, rule, conditions);
}

/// [T, top_k] the experts that nobody has chosen by their scores.
torch::Tensor forced_choice(const torch::Tensor& x, const MoEOptions& options) {
  const int64_t tokens = x.size(0);
  if (options.forced_routing == ForcedRouting::kRandom) {
    const auto drawn = torch::rand({tokens, options.num_experts}, x.options().dtype(torch::kFloat));
    return route(drawn, options.top_k, false).expert_ids;
  }
  const auto first = torch::arange(tokens * options.top_k, x.options().dtype(torch::kInt64));
  return first.remainder(options.num_experts).view({tokens, options.top_k});
}

/// By the rule, or for benchmarks by none.
Routing by_rule(const torch::Tensor& x, const torch::Tensor& weight, const MoEOptions& options,
                RoutingConditions conditions) {
  const bool forced =
      options.forced_routing != ForcedRouting::kNone && !conditions.expert_ids.defined();
  if (forced) {
    conditions.expert_ids = forced_choice(x.detach(), options);
  }
  auto routing = route_rows(x, weight, routing_rule(options), conditions);
  if (forced) {
    routing.may_skip = conditions.padding_mask.defined();
  }
  return routing;
}

/// By the rule, with at most a share of the choices outside the node.
Routing mostly_near(const torch::Tensor& x, const torch::Tensor& weight, const MoEOptions& options,
                    RoutingConditions conditions) {
  const auto rule = routing_rule(options);
  const auto logits = gate_logits(x, weight);
  RoutingConditions of_choice = conditions;
  of_choice.sequences = 0;
  of_choice.bias_histogram = false;
  const auto choice = route(logits.detach(), rule, of_choice);
  conditions.expert_ids =
      choose_near(logits.detach(), choice, rule, of_choice, options.cross_node_limit);
  auto routing = route(logits, rule, conditions);
  routing.first_nonfinite_token = choice.first_nonfinite_token;
  routing.may_skip = conditions.padding_mask.defined();
  return routing;
}

/// What was computed in fp64, as the exchange and the losses take it.
void round_to(torch::Dtype dtype, Routing& routing) {
  for (auto* tensor : {&routing.weights, &routing.probability_sum, &routing.squared_logsumexp_sum,
                       &routing.importance, &routing.smooth_load}) {
    if (tensor->defined()) *tensor = tensor->to(dtype);
  }
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

Routing RouterImpl::forward(const torch::Tensor& x, const RoutingConditions& conditions) {
  return route_tokens(x, router_parameters(), options_, is_training(), conditions);
}

void RouterImpl::update_expert_bias(const torch::Tensor& expert_load, double rate) {
  if (options_.expert_bias_update == BiasUpdate::kQuantile) {
    update_expert_bias_by_quantile(expert_bias, expert_load, options_.top_k, rate);
    return;
  }
  anabranch::update_expert_bias(expert_bias, expert_load, rate);
}

Routing route_tokens(const torch::Tensor& x, const RouterParameters& parameters,
                     const MoEOptions& options, bool training, const RoutingConditions& given) {
  const Stage named("anabranch.route");
  RouterParameters own = parameters;
  if (options.router_fp64) {
    for (auto* tensor : {&own.weight, &own.noise_weight, &own.expert_bias}) {
      if (tensor->defined()) *tensor = tensor->to(torch::kFloat64);
    }
  }
  const torch::Tensor& weight = own.weight;
  check_input(x.defined(), "router: x is undefined");
  check_input(x.dim() == 2 && x.size(1) == weight.size(1), "router: x is ", x.sizes(),
              ", expected [T, ", weight.size(1), "]");
  check_input(x.is_floating_point() && x.device() == weight.device(), "router: x is ",
              x.scalar_type(), " on ", x.device(), ", expected a floating type on ",
              weight.device());
  torch::Tensor gate_input = options.router_fp64 ? x.to(torch::kFloat64) : x;
  if (training && options.jitter > 0) {
    gate_input = x.to(weight.scalar_type());
    gate_input =
        gate_input * torch::empty_like(gate_input).uniform_(1 - options.jitter, 1 + options.jitter);
  }
  RoutingConditions conditions = given;
  conditions.expert_bias = own.expert_bias;
  conditions.bias_histogram = training && options.expert_bias_update == BiasUpdate::kQuantile;
  Routing routing;
  switch (options.gate) {
    case Gate::kTopK:
      if (training && options.cross_node_limit > 0 && conditions.near_experts.defined() &&
          !conditions.expert_ids.defined()) {
        routing = mostly_near(gate_input, weight, options, std::move(conditions));
        break;
      }
      routing = by_rule(gate_input, weight, options, std::move(conditions));
      break;
    case Gate::kNoisyTopK:
      routing = noisy_top_k(gate_input, own, options, training, conditions);
      break;
    case Gate::kGShard:
      routing = gshard(gate_input, weight, options, training, conditions);
      break;
    case Gate::kSinkhorn:
      routing = sinkhorn(gate_input, weight, options, training, std::move(conditions));
      break;
    case Gate::kExpertChoice:
      routing = expert_choice(gate_input, weight, options, training, std::move(conditions));
      break;
  }
  if (options.router_fp64) {
    round_to(parameters.weight.scalar_type(), routing);
  }
  return routing;
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

void update_expert_bias_by_quantile(torch::Tensor& expert_bias, const torch::Tensor& histogram,
                                    int64_t top_k, double rate) {
  check_input(expert_bias.defined(), "update_expert_bias: the router has no bias of its experts");
  const int64_t experts = expert_bias.size(0);
  check_input(histogram.defined() && histogram.sizes() == at::IntArrayRef({experts, kBiasBins}),
              "update_expert_bias: the histogram is ",
              histogram.defined() ? histogram.sizes() : at::IntArrayRef(), ", expected [", experts,
              ", ", kBiasBins, "]");
  check_input(rate >= 0 && rate <= 1, "update_expert_bias: rate = ", rate, ", expected 0 to 1");
  const torch::NoGradGuard no_grad;
  const auto counts = histogram.to(expert_bias.device(), torch::kFloat64);
  const auto running = counts.cumsum(1);
  const auto tokens = running.narrow(1, kBiasBins - 1, 1);  // [E, 1]
  const auto wanted = tokens * (static_cast<double>(top_k) / static_cast<double>(experts));
  const auto bin = running.lt(wanted).sum(1, /*keepdim=*/true).clamp_max(kBiasBins - 1);
  const auto inside = counts.gather(1, bin).clamp_min(1);
  const auto before = running.gather(1, bin) - counts.gather(1, bin);
  const auto place = (bin + (wanted - before) / inside).squeeze(1);  // in bins
  const auto old = expert_bias.to(torch::kFloat64);
  const auto least = old.min() - 1;
  auto found = least + place * ((old.max() + 1 - least) / static_cast<double>(kBiasBins));
  found = old + rate * (found - found.mean() - old);
  expert_bias.copy_(found.where(tokens.squeeze(1).gt(0), old));
}

}  // namespace anabranch
