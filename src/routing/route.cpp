#include <anabranch/router.h>
#include <torch/csrc/autograd/custom_function.h>

#include "kernels/kernels.h"
#include "support/check.h"
#include "support/stage.h"

namespace anabranch {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// logits [T, E] → weights, probability_sum, squared_logsumexp_sum; then, without gradient,
/// expert_ids, counts, first_nonfinite_token.
struct Route : torch::autograd::Function<Route> {
  static variable_list forward(AutogradContext* context, const torch::Tensor& logits, int64_t top_k,
                               bool renormalize) {
    const RouteResult routed =
        kernels_for(logits.device()).route(logits.contiguous(), top_k, renormalize);
    context->saved_data["renormalize"] = renormalize;
    context->save_for_backward(
        {routed.expert_ids, routed.weights, routed.probabilities, routed.logsumexp});
    context->mark_non_differentiable(
        {routed.expert_ids, routed.counts, routed.first_nonfinite_token});
    return {routed.weights,
            routed.probabilities.sum(0),
            routed.logsumexp.square().sum(),
            routed.expert_ids,
            routed.counts,
            routed.first_nonfinite_token};
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const torch::NoGradGuard no_grad;
    const Stage named("anabranch.route.backward");
    const auto saved = context->get_saved_variables();
    RouteResult routed;
    routed.expert_ids = saved[0];
    routed.weights = saved[1];
    routed.probabilities = saved[2];
    routed.logsumexp = saved[3];
    return {kernels_for(saved[1].device())
                .route_backward(routed, context->saved_data["renormalize"].toBool(),
                                gradients[0].contiguous(), gradients[1].contiguous(), gradients[2]),
            {},
            {}};
  }
};

}  // namespace

Routing route(const torch::Tensor& logits, int64_t top_k, bool renormalize) {
  check_input(logits.defined(), "route: logits are undefined");
  check_input(logits.dim() == 2 && logits.size(1) > 0, "route: logits are ", logits.sizes(),
              ", expected [tokens, experts]");
  check_input(logits.scalar_type() == torch::kFloat32 || logits.scalar_type() == torch::kFloat64,
              "route: logits are ", logits.scalar_type(), ", expected fp32 or fp64");
  check_input(top_k >= 1 && top_k <= logits.size(1), "route: top_k = ", top_k, " with ",
              logits.size(1), " experts, expected 1 ≤ top_k ≤ experts");
  auto outputs = Route::apply(logits, top_k, renormalize);
  return {.expert_ids = outputs[3],
          .weights = outputs[0],
          .counts = outputs[4],
          .probability_sum = outputs[1],
          .squared_logsumexp_sum = outputs[2],
          .first_nonfinite_token = outputs[5]};
}

}  // namespace anabranch
