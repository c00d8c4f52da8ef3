#include <anabranch/router.h>
#include <torch/csrc/autograd/custom_function.h>

#include "kernels/routing.h"
#include "routing/gate.h"
#include "routing/route.h"
#include "routing/rule.h"
#include "support/check.h"
#include "support/given.h"
#include "support/single_backward.h"
#include "support/stage.h"
#include "support/tensor_list.h"

namespace anabranch {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct RuleHolder : torch::CustomClassHolder {
  explicit RuleHolder(const RoutingRule& rule) : rule(rule) {}
  RoutingRule rule;
};

/// What comes out of it, or the gradients of that; the last three have none. See Routing.
struct Routed {
  torch::Tensor weights;
  torch::Tensor probability_sum;
  torch::Tensor squared_logsumexp_sum;
  torch::Tensor expert_ids;
  torch::Tensor counts;
  torch::Tensor first_nonfinite_token;

  auto tensors() {
    return std::tie(weights, probability_sum, squared_logsumexp_sum, expert_ids, counts,
                    first_nonfinite_token);
  }
};

/// What RoutingKernels::route_backward reads of a RouteResult, and gate_gradient.
struct Saved {
  torch::Tensor expert_ids;
  torch::Tensor weights;
  torch::Tensor probabilities;  ///< of sigmoids: the logits
  torch::Tensor logsumexp;
  // Undefined where the logits were given.
  torch::Tensor x;
  torch::Tensor gate_weight;
  torch::Tensor split_gate_weight;

  auto tensors() {
    return std::tie(expert_ids, weights, probabilities, logsumexp, x, gate_weight,
                    split_gate_weight);
  }
};

/// logits [T, E] → Routed; with `gate_weight` [E, h], rows x [T, h] → their logits → Routed.
struct Route : torch::autograd::Function<Route> {
  static variable_list forward(AutogradContext* context, const torch::Tensor& input,
                               const std::optional<torch::Tensor>& gate_weight,
                               const std::optional<torch::Tensor>& expert_bias,
                               const c10::intrusive_ptr<RuleHolder>& holder) {
    const RoutingRule& rule = holder->rule;
    const auto bias = expert_bias.value_or(torch::Tensor());
    auto [logits, split_weight] =
        gate_weight ? gate_product(input, *gate_weight) : GateProduct{input.contiguous(), {}};
    if (logits.dim() == 3 && !is_plain(rule, bias)) {
      logits = logits.sum(1);
    }
    const RoutingKernels& kernels = RoutingKernels::on(logits.device());
    const RouteResult routed = kernels.route(logits, rule, bias);
    const RoutingSums sums = kernels.routing_sums(routed.probabilities, routed.logsumexp);
    const bool sigmoid = rule.router_score == RouterScore::kSigmoid;
    context->saved_data["rule"] = torch::IValue::make_capsule(holder);
    context->set_materialize_grads(false);
    context->save_for_backward(
        pack(Saved{routed.expert_ids, routed.weights, sigmoid ? logits : routed.probabilities,
                   routed.logsumexp, gate_weight ? input : torch::Tensor(),
                   gate_weight.value_or(torch::Tensor()), split_weight}));
    context->mark_non_differentiable(
        {routed.expert_ids, routed.counts, routed.first_nonfinite_token});
    return pack(Routed{routed.weights, sums.probabilities, sums.squared_logsumexp,
                       routed.expert_ids, routed.counts, routed.first_nonfinite_token});
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    refuse_double_backward("route");
    const torch::NoGradGuard no_grad;
    const Stage named("anabranch.route.backward");
    const auto saved = unpack<Saved>(context->get_saved_variables());
    const auto gradient = unpack<Routed>(gradients);
    const auto holder =
        c10::static_intrusive_pointer_cast<RuleHolder>(context->saved_data["rule"].toCapsule());
    const RouteResult routed{.expert_ids = saved.expert_ids,
                             .weights = saved.weights,
                             .probabilities = saved.probabilities,
                             .logsumexp = saved.logsumexp,
                             .counts = {},
                             .first_nonfinite_token = {}};
    const auto contiguous = [](const torch::Tensor& tensor) {
      return tensor.defined() ? tensor.contiguous() : tensor;
    };
    const auto dweights = gradient.weights.defined() ? gradient.weights.contiguous()
                                                     : torch::zeros_like(routed.weights);
    auto dlogits =
        RoutingKernels::on(routed.weights.device())
            .route_backward(routed, holder->rule, dweights, contiguous(gradient.probability_sum),
                            gradient.squared_logsumexp_sum,
                            /*split=*/saved.split_gate_weight.defined());
    if (!saved.gate_weight.defined()) {
      return {std::move(dlogits), {}, {}, {}};
    }
    auto [dx, dweight] = gate_gradient(dlogits, saved.x, saved.gate_weight, saved.split_gate_weight,
                                       context->needs_input_grad(0), context->needs_input_grad(1));
    return {std::move(dx), std::move(dweight), {}, {}};
  }
};

void check_bias(const torch::Tensor& expert_bias, const torch::Tensor& logits) {
  check_input(expert_bias.sizes() == logits.sizes().slice(1) &&
                  expert_bias.scalar_type() == logits.scalar_type() &&
                  expert_bias.device() == logits.device(),
              "route: expert_bias is ", expert_bias.scalar_type(), " ", expert_bias.sizes(), " on ",
              expert_bias.device(), ", expected ", logits.scalar_type(), " ",
              logits.sizes().slice(1), " on ", logits.device());
}

Routing routed(const torch::Tensor& input, const torch::Tensor& gate_weight,
               const RoutingRule& rule, const torch::Tensor& expert_bias) {
  const auto found = unpack<Routed>(Route::apply(input, given(gate_weight), given(expert_bias),
                                                 c10::make_intrusive<RuleHolder>(rule)));
  return {.expert_ids = found.expert_ids,
          .weights = found.weights,
          .counts = found.counts,
          .probability_sum = found.probability_sum,
          .squared_logsumexp_sum = found.squared_logsumexp_sum,
          .importance = {},
          .smooth_load = {},
          .first_counts = {},
          .first_nonfinite_token = found.first_nonfinite_token};
}

}  // namespace

Routing route_rows(const torch::Tensor& x, const torch::Tensor& gate_weight,
                   const RoutingRule& rule, const torch::Tensor& expert_bias) {
  check_rule(rule, gate_weight.size(0), "route");
  return routed(x, gate_weight, rule,
                expert_bias.defined() ? expert_bias.detach().contiguous() : expert_bias);
}

Routing route(const torch::Tensor& logits, const RoutingRule& rule,
              const torch::Tensor& expert_bias) {
  check_input(logits.defined(), "route: logits are undefined");
  check_input(logits.dim() == 2 && logits.size(1) > 0, "route: logits are ", logits.sizes(),
              ", expected [tokens, experts]");
  check_input(logits.scalar_type() == torch::kFloat32 || logits.scalar_type() == torch::kFloat64,
              "route: logits are ", logits.scalar_type(), ", expected fp32 or fp64");
  check_rule(rule, logits.size(1), "route");
  if (expert_bias.defined()) {
    check_bias(expert_bias, logits);
  }
  return routed(logits, {}, rule,
                expert_bias.defined() ? expert_bias.detach().contiguous() : expert_bias);
}

Routing route(const torch::Tensor& logits, int64_t top_k, bool renormalize) {
  RoutingRule rule;
  rule.top_k = top_k;
  rule.renormalize = renormalize;
  return route(logits, rule);
}

}  // namespace anabranch
