#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/zeros.h>
#include <anabranch/router.h>
#include <torch/csrc/autograd/custom_function.h>

#include "kernels/gate.h"
#include "kernels/routing.h"
#include "routing/gate.h"
#include "routing/route.h"
#include "routing/rule.h"
#include "support/check.h"
#include "support/given.h"
#include "support/observer.h"
#include "support/single_backward.h"
#include "support/stage.h"
#include "support/tensor_list.h"

namespace anabranch {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// [T, ...] → [S, T / S, ...].
torch::Tensor in_sequences(const torch::Tensor& of_tokens, int64_t sequences) {
  auto sizes = of_tokens.sizes().vec();
  sizes[0] /= sequences;
  sizes.insert(sizes.begin(), sequences);
  return of_tokens.view(sizes);
}

struct RuleHolder : torch::CustomClassHolder {
  RuleHolder(const RoutingRule& rule, const RoutingConditions& conditions, Choice choice)
      : rule(rule), conditions(conditions), choice(choice) {}
  RoutingRule rule;
  RoutingConditions conditions;
  Choice choice;
  std::shared_ptr<const Observer> observer = backward_observer();
};

/// What comes out of it, or the gradients of that; the last four have none. See Routing.
struct Routed {
  torch::Tensor weights;
  torch::Tensor probability_sum;
  torch::Tensor squared_logsumexp_sum;
  torch::Tensor sequence_probability_sum;  ///< of no elements where it is not wanted
  torch::Tensor expert_ids;
  torch::Tensor counts;
  torch::Tensor first_nonfinite_token;
  torch::Tensor bias_histogram;  ///< of no elements where it is not wanted

  auto tensors() {
    return std::tie(weights, probability_sum, squared_logsumexp_sum, sequence_probability_sum,
                    expert_ids, counts, first_nonfinite_token, bias_histogram);
  }
};

/// What RoutingKernels::route_backward reads of a RouteResult, and gate_gradient.
struct Saved {
  torch::Tensor expert_ids;
  torch::Tensor weights;
  torch::Tensor probabilities;  ///< of scores other than softmax: the logits
  torch::Tensor logsumexp;
  torch::Tensor padding_mask;
  // Undefined where the logits were given.
  torch::Tensor x;
  torch::Tensor gate_weight;
  torch::Tensor split_gate_weight;

  auto tensors() {
    return std::tie(expert_ids, weights, probabilities, logsumexp, padding_mask, x, gate_weight,
                    split_gate_weight);
  }
};

/// The gradient of the probabilities' sums, [E], or [S, E] where those of sequences have one.
torch::Tensor gradient_of_sums(const torch::Tensor& of_all, const torch::Tensor& of_sequences) {
  if (!of_sequences.defined() || of_sequences.numel() == 0) {
    return of_all;
  }
  return of_all.defined() ? of_sequences + of_all : of_sequences;
}

/// logits [T, E] → Routed; with `gate_weight` [E, h], rows x [T, h] → their logits → Routed.
struct Route : torch::autograd::Function<Route> {
  static variable_list forward(AutogradContext* context, const torch::Tensor& input,
                               const std::optional<torch::Tensor>& gate_weight,
                               const c10::intrusive_ptr<RuleHolder>& holder) {
    const RoutingRule& rule = holder->rule;
    auto [logits, split_weight] =
        gate_weight ? gate_product(input, *gate_weight) : GateProduct{input.contiguous(), {}};
    if (logits.dim() == 3 && !is_plain(rule, holder->conditions)) {
      logits = GateKernels::on(logits.device()).sum_parts(logits);
    }
    const RoutingKernels& kernels = RoutingKernels::on(logits.device());
    const RouteResult routed = kernels.route(logits, rule, holder->conditions, holder->choice);
    const RoutingSums sums =
        kernels.routing_sums(routed.probabilities, routed.logsumexp, holder->conditions.sequences);
    const bool softmax = rule.router_score == RouterScore::kSoftmax;
    const auto histogram =
        holder->conditions.bias_histogram
            ? kernels.bias_histogram(softmax ? routed.probabilities : logits.sigmoid(), rule,
                                     holder->conditions)
            : at::empty({0}, routed.counts.options());
    context->saved_data["rule"] = torch::IValue::make_capsule(holder);
    context->set_materialize_grads(false);
    context->save_for_backward(
        pack(Saved{routed.expert_ids, routed.weights, softmax ? routed.probabilities : logits,
                   routed.logsumexp, routed.padding_mask, gate_weight ? input : torch::Tensor(),
                   gate_weight.value_or(torch::Tensor()), split_weight}));
    context->mark_non_differentiable(
        {routed.expert_ids, routed.counts, routed.first_nonfinite_token, histogram});
    return pack(Routed{routed.weights, sums.probabilities, sums.squared_logsumexp,
                       sums.of_sequences, routed.expert_ids, routed.counts,
                       routed.first_nonfinite_token, histogram});
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    refuse_double_backward("route");
    const torch::NoGradGuard no_grad;
    const auto saved = unpack<Saved>(context->get_saved_variables());
    const auto gradient = unpack<Routed>(gradients);
    const auto holder =
        c10::static_intrusive_pointer_cast<RuleHolder>(context->saved_data["rule"].toCapsule());
    const auto observed = begin(holder->observer);
    const Stage named("anabranch.route.backward");
    const RouteResult routed{.expert_ids = saved.expert_ids,
                             .weights = saved.weights,
                             .probabilities = saved.probabilities,
                             .logsumexp = saved.logsumexp,
                             .counts = {},
                             .first_nonfinite_token = {},
                             .padding_mask = saved.padding_mask};
    const auto contiguous = [](const torch::Tensor& tensor) {
      return tensor.defined() ? tensor.contiguous() : tensor;
    };
    const auto dweights = gradient.weights.defined() ? gradient.weights.contiguous()
                                                     : torch::zeros_like(routed.weights);
    const auto dsums =
        gradient_of_sums(gradient.probability_sum, gradient.sequence_probability_sum);
    auto dlogits = RoutingKernels::on(routed.weights.device())
                       .route_backward(routed, holder->rule, dweights, contiguous(dsums),
                                       gradient.squared_logsumexp_sum,
                                       /*split=*/saved.split_gate_weight.defined());
    if (!saved.gate_weight.defined()) {
      return {std::move(dlogits), {}, {}};
    }
    auto [dx, dweight] = gate_gradient(dlogits, saved.x, saved.gate_weight, saved.split_gate_weight,
                                       context->needs_input_grad(0), context->needs_input_grad(1));
    return {std::move(dx), std::move(dweight), {}};
  }
};

SequenceSums sums_of_sequences(const torch::Tensor& probability_sum,
                               const torch::Tensor& expert_ids,
                               const RoutingConditions& conditions) {
  const int64_t sequences = conditions.sequences;
  const int64_t length = expert_ids.size(0) / sequences;
  const auto options = probability_sum.options().requires_grad(false);
  return {probability_sum,
          RoutingKernels::on(expert_ids.device())
              .sequence_counts(expert_ids, sequences, probability_sum.size(1),
                               probability_sum.scalar_type()),
          conditions.padding_mask.defined()
              ? in_sequences(conditions.padding_mask.logical_not(), sequences).sum(1).to(options)
              : at::full({sequences}, static_cast<double>(length), options)};
}

void check_conditions(const RoutingConditions& conditions, at::IntArrayRef sizes,
                      torch::Device device, const RoutingRule& rule) {
  const auto check = [&](const torch::Tensor& tensor, const char* name, at::IntArrayRef wanted,
                         torch::Dtype dtype) {
    check_input(!tensor.defined() || (tensor.sizes() == wanted && tensor.scalar_type() == dtype &&
                                      tensor.device() == device),
                "route: ", name, " is ", tensor.defined() ? tensor.toString() : "", " ",
                tensor.defined() ? tensor.sizes() : at::IntArrayRef(), ", expected ", dtype, " ",
                wanted, " on ", device);
  };
  check(conditions.expert_ids, "expert_ids", {sizes[0], rule.top_k}, torch::kInt64);
  check(conditions.padding_mask, "padding_mask", {sizes[0]}, torch::kBool);
  check(conditions.near_experts, "near_experts", {sizes[1]}, torch::kBool);
  check_input(
      !conditions.bias_histogram || (conditions.expert_bias.defined() && rule.expert_groups == 1 &&
                                     rule.router_score != RouterScore::kSqrtSoftplus),
      "route: bias_histogram takes an expert_bias, one group of experts and softmax or "
      "sigmoid scores");
  const int64_t sequences = conditions.sequences;
  check_input(sequences >= 0 && (sequences == 0 || sizes[0] % sequences == 0), "route: ", sizes[0],
              " tokens in ", sequences, " sequences of equal length");
}

void check_bias(const torch::Tensor& expert_bias, const torch::Tensor& logits) {
  check_input(expert_bias.sizes() == logits.sizes().slice(1) &&
                  expert_bias.scalar_type() == logits.scalar_type() &&
                  expert_bias.device() == logits.device(),
              "route: expert_bias is ", expert_bias.scalar_type(), " ", expert_bias.sizes(), " on ",
              expert_bias.device(), ", expected ", logits.scalar_type(), " ",
              logits.sizes().slice(1), " on ", logits.device());
}

Routing routed(const torch::Tensor& input, const torch::Tensor& gate_weight,
               const RoutingRule& rule, const RoutingConditions& conditions,
               Choice choice = Choice::kByRule) {
  RoutingConditions contiguous = conditions;
  for (auto* tensor : {&contiguous.expert_bias, &contiguous.expert_ids, &contiguous.padding_mask}) {
    if (tensor->defined()) *tensor = tensor->detach().contiguous();
  }
  const auto found = unpack<Routed>(Route::apply(
      input, given(gate_weight), c10::make_intrusive<RuleHolder>(rule, contiguous, choice)));
  Routing routing;
  routing.expert_ids = found.expert_ids;
  routing.weights = found.weights;
  routing.counts = found.counts;
  routing.probability_sum = found.probability_sum;
  routing.squared_logsumexp_sum = found.squared_logsumexp_sum;
  // Ids from outside are checked by the exchange, as all else is.
  if (!conditions.expert_ids.defined() || choice == Choice::kMade) {
    routing.first_nonfinite_token = found.first_nonfinite_token;
  }
  routing.may_skip = conditions.padding_mask.defined() || conditions.expert_ids.defined();
  if (conditions.padding_mask.defined()) {
    routing.num_tokens = conditions.padding_mask.logical_not().sum();
  }
  if (conditions.sequences > 0) {
    routing.sequences =
        sums_of_sequences(found.sequence_probability_sum, found.expert_ids, conditions);
  }
  if (conditions.bias_histogram) {
    routing.bias_histogram = found.bias_histogram;
  }
  return routing;
}

}  // namespace

Routing route_rows(const torch::Tensor& x, const torch::Tensor& gate_weight,
                   const RoutingRule& rule, const RoutingConditions& conditions) {
  check_rule(rule, gate_weight.size(0), "route");
  check_conditions(conditions, {x.size(0), gate_weight.size(0)}, x.device(), rule);
  return routed(x, gate_weight, rule, conditions);
}

Routing route_by(Choice choice, const torch::Tensor& logits, const RoutingRule& rule,
                 const RoutingConditions& conditions) {
  check_rule(rule, logits.size(1), "route");
  check_conditions(conditions, logits.sizes(), logits.device(), rule);
  return routed(logits, {}, rule, conditions, choice);
}

Routing route(const torch::Tensor& logits, const RoutingRule& rule,
              const torch::Tensor& expert_bias) {
  RoutingConditions conditions;
  conditions.expert_bias = expert_bias;
  return route(logits, rule, conditions);
}

Routing route(const torch::Tensor& logits, const RoutingRule& rule,
              const RoutingConditions& conditions) {
  check_input(logits.defined(), "route: logits are undefined");
  check_input(logits.dim() == 2 && logits.size(1) > 0, "route: logits are ", logits.sizes(),
              ", expected [tokens, experts]");
  check_input(logits.scalar_type() == torch::kFloat32 || logits.scalar_type() == torch::kFloat64,
              "route: logits are ", logits.scalar_type(), ", expected fp32 or fp64");
  check_rule(rule, logits.size(1), "route");
  if (conditions.expert_bias.defined()) {
    check_bias(conditions.expert_bias, logits);
  }
  check_conditions(conditions, logits.sizes(), logits.device(), rule);
  return routed(logits, {}, rule, conditions);
}

Routing route(const torch::Tensor& logits, int64_t top_k, bool renormalize) {
  RoutingRule rule;
  rule.top_k = top_k;
  rule.renormalize = renormalize;
  return route(logits, rule);
}

}  // namespace anabranch
