#include <anabranch/router.h>
#include <torch/csrc/autograd/custom_function.h>

#include "kernels/routing.h"
#include "routing/rule.h"
#include "support/check.h"
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

/// What RoutingKernels::route_backward reads of a RouteResult.
struct Saved {
  torch::Tensor expert_ids;
  torch::Tensor weights;
  torch::Tensor probabilities;  ///< of sigmoids: the logits
  torch::Tensor logsumexp;

  auto tensors() { return std::tie(expert_ids, weights, probabilities, logsumexp); }
};

/// logits [T, E] → Routed.
struct Route : torch::autograd::Function<Route> {
  static variable_list forward(AutogradContext* context, const torch::Tensor& logits,
                               const std::optional<torch::Tensor>& expert_bias,
                               const c10::intrusive_ptr<RuleHolder>& holder) {
    const RoutingRule& rule = holder->rule;
    const auto contiguous = logits.contiguous();
    const RoutingKernels& kernels = RoutingKernels::on(logits.device());
    const RouteResult routed =
        kernels.route(contiguous, rule, expert_bias.value_or(torch::Tensor()));
    const RoutingSums sums = kernels.routing_sums(routed.probabilities, routed.logsumexp);
    const bool sigmoid = rule.router_score == RouterScore::kSigmoid;
    context->saved_data["rule"] = torch::IValue::make_capsule(holder);
    context->set_materialize_grads(false);
    context->save_for_backward(
        pack(Saved{routed.expert_ids, routed.weights, sigmoid ? contiguous : routed.probabilities,
                   routed.logsumexp}));
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
    return {
        RoutingKernels::on(routed.weights.device())
            .route_backward(routed, holder->rule, dweights, contiguous(gradient.probability_sum),
                            gradient.squared_logsumexp_sum),
        {},
        {}};
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

}  // namespace

Routing route(const torch::Tensor& logits, const RoutingRule& rule,
              const torch::Tensor& expert_bias) {
  check_input(logits.defined(), "route: logits are undefined");
  check_input(logits.dim() == 2 && logits.size(1) > 0, "route: logits are ", logits.sizes(),
              ", expected [tokens, experts]");
  check_input(logits.scalar_type() == torch::kFloat32 || logits.scalar_type() == torch::kFloat64,
              "route: logits are ", logits.scalar_type(), ", expected fp32 or fp64");
  check_rule(rule, logits.size(1), "route");
  std::optional<torch::Tensor> bias;
  if (expert_bias.defined()) {
    check_bias(expert_bias, logits);
    bias = expert_bias.detach().contiguous();
  }
  const auto routed =
      unpack<Routed>(Route::apply(logits, bias, c10::make_intrusive<RuleHolder>(rule)));
  return {.expert_ids = routed.expert_ids,
          .weights = routed.weights,
          .counts = routed.counts,
          .probability_sum = routed.probability_sum,
          .squared_logsumexp_sum = routed.squared_logsumexp_sum,
          .importance = {},
          .smooth_load = {},
          .first_counts = {},
          .first_nonfinite_token = routed.first_nonfinite_token};
}

Routing route(const torch::Tensor& logits, int64_t top_k, bool renormalize) {
  RoutingRule rule;
  rule.top_k = top_k;
  rule.renormalize = renormalize;
  return route(logits, rule);
}

}  // namespace anabranch
