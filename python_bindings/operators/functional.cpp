// The stages of the layer as operators of their own. Dispatch and combine, permute and unpermute are
// each the other's adjoint, so their gradients are these same operators (functional.py).

#include <anabranch/router.h>

#include "experts/permute.h"
#include "graph.h"
#include "operators.h"
#include "plan.h"
#include "registry.h"
#include "support/check.h"
#include "support/tensor_list.h"

namespace anabranch::operators {
namespace {

using Tensors = std::vector<at::Tensor>;

/// What route_forward returns: see Routing, and RecordedGraph for the state.
struct Routed {
  at::Tensor weights;
  at::Tensor probability_sum;
  at::Tensor squared_logsumexp_sum;
  at::Tensor expert_ids;
  at::Tensor counts;
  at::Tensor state;

  auto tensors() {
    return std::tie(weights, probability_sum, squared_logsumexp_sum, expert_ids, counts, state);
  }
};

/// What an operator returns shares its memory with nothing else.
at::Tensor own(const at::Tensor& tensor) {
  return tensor.storage().nbytes() == tensor.nbytes() ? tensor.detach() : tensor.detach().clone();
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> route_forward(
    const at::Tensor& logits, int64_t top_k, bool renormalize, bool needs_gradient) {
  auto leaf = logits.detach();
  RecordedGraph graph;
  if (needs_gradient) graph.inputs.push_back(leaf.requires_grad_());
  const Recording recording(needs_gradient);
  const Routing routing = anabranch::route(leaf, top_k, renormalize);
  for (const auto& tensor :
       {routing.weights, routing.probability_sum, routing.squared_logsumexp_sum}) {
    if (needs_gradient) {
      graph.outputs.push_back(torch::autograd::impl::gradient_edge(tensor));
    }
  }
  return Routed{.weights = own(routing.weights),
                .probability_sum = own(routing.probability_sum),
                .squared_logsumexp_sum = own(routing.squared_logsumexp_sum),
                .expert_ids = own(routing.expert_ids),
                .counts = own(routing.counts),
                .state = as_tensor(std::move(graph))}
      .tensors();
}

at::Tensor route_backward(at::TensorList gradients, const at::Tensor& state,
                          const at::Tensor& /*logits*/) {
  return run_backward(recorded_graph(state), gradients.vec()).at(0);
}

/// The same in the caller's graph, without a state.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> route(
    const at::Tensor& logits, int64_t top_k, bool renormalize) {
  if (!is_traced(logits)) {
    const Routing routing = anabranch::route(logits, top_k, renormalize);
    return {routing.weights, routing.probability_sum, routing.squared_logsumexp_sum,
            routing.expert_ids, routing.counts};
  }
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("anabranch::route_forward", "")
                             .typed<decltype(route_forward)>();
  const bool needs_gradient = at::GradMode::is_enabled() && logits.requires_grad();
  auto [weights, probabilities, logsumexp, expert_ids, counts, state] =
      op.call(logits, top_k, renormalize, needs_gradient);
  return {weights, probabilities, logsumexp, expert_ids, counts};
}

Tensors plan(const at::Tensor& expert_ids, const at::Tensor& weights, int64_t num_experts,
             std::string group, bool may_skip) {
  Routing routing;
  routing.may_skip = may_skip;
  routing.expert_ids = expert_ids;
  routing.weights = weights;
  return pack_plan(exchange_for(group, num_experts)->plan(routing));
}

std::optional<at::Tensor> contiguous(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() ? std::optional(tensor->contiguous()) : std::nullopt;
}

/// Results that are no input, which those of one rank may be.
std::tuple<at::Tensor, at::Tensor> apart(const Payload& payload, const at::Tensor& input) {
  return {payload.rows.is_alias_of(input) ? payload.rows.clone() : payload.rows,
          payload.values.defined() ? payload.values : at::empty({0}, input.options())};
}

/// The plan, for rows on that device. `top_k` as for unpack_plan.
ExchangePlan plan_for(const at::Tensor& rows, at::TensorList list, int64_t top_k = 0) {
  auto plan = unpack_plan(list, top_k);
  check_input(plan.send_tokens.device() == rows.device(), "plan: rows are on ", rows.device(),
              ", its indices on ", plan.send_tokens.device());
  return plan;
}

/// The plan, for an exchange of such rows.
ExchangePlan plan_for(const Exchange& exchange, const at::Tensor& rows, at::TensorList list,
                      int64_t top_k) {
  check_input(top_k >= 1, "plan: top_k = ", top_k, ", expected at least 1");
  auto plan = plan_for(rows, list, top_k);
  const auto ranks = static_cast<size_t>(exchange.placement().num_ranks);
  for (const auto* counts :
       {&plan.send_rows, &plan.receive_rows, &plan.send_assignments, &plan.receive_assignments}) {
    check_input(counts->size() == ranks, "plan: it is of ", counts->size(),
                " ranks, and the group has ", ranks);
  }
  const auto experts = exchange.placement().local_experts(exchange.communicator().rank());
  check_input(plan.expert_counts.experts() == experts, "plan: it is of ",
              plan.expert_counts.experts(), " experts on this rank, expected ", experts);
  return plan;
}

std::tuple<at::Tensor, at::Tensor> dispatch(const at::Tensor& rows,
                                            const std::optional<at::Tensor>& values,
                                            at::TensorList plan, int64_t top_k, int64_t num_experts,
                                            std::string group) {
  const auto exchange = exchange_for(group, num_experts);
  const Payload tokens = {rows.contiguous(), contiguous(values).value_or(at::Tensor())};
  return apart(exchange->dispatch(tokens, plan_for(*exchange, rows, plan, top_k)), rows);
}

std::tuple<at::Tensor, at::Tensor> combine(const at::Tensor& rows,
                                           const std::optional<at::Tensor>& values,
                                           at::TensorList plan, int64_t top_k, int64_t num_experts,
                                           std::string group) {
  const auto exchange = exchange_for(group, num_experts);
  const Payload results = {rows.contiguous(), contiguous(values).value_or(at::Tensor())};
  return apart(exchange->combine(results, plan_for(*exchange, rows, plan, top_k)), rows);
}

void check_rows(const at::Tensor& rows, int64_t expected, const char* call) {
  check_input(rows.dim() == 2 && rows.size(0) == expected, call, ": rows are ", rows.sizes(),
              ", expected [", expected, ", h] for this plan");
}

at::Tensor permute_rows(const at::Tensor& rows, at::TensorList list) {
  const auto plan = plan_for(rows, list);
  check_rows(rows, plan.rows(), "permute");
  return permute(rows.contiguous(), plan);
}

at::Tensor unpermute_rows(const at::Tensor& assignments, const std::optional<at::Tensor>& weights,
                          at::TensorList list) {
  const auto plan = plan_for(assignments, list);
  check_rows(assignments, plan.assignments(), "unpermute");
  check_input(!weights.has_value() || weights->sizes() == at::IntArrayRef({plan.assignments()}),
              "unpermute: weights are ", weights.has_value() ? weights->sizes() : at::IntArrayRef(),
              ", expected [", plan.assignments(), "] for this plan");
  return unpermute(assignments.contiguous(), contiguous(weights).value_or(at::Tensor()), plan);
}

at::Tensor gemm(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& counts,
                std::string engine) {
  return grouped_gemm(*engine_for(x.device(), engine), x.contiguous(), weight.contiguous(),
                      counts_from(counts));
}

at::Tensor gemm_dgrad(const at::Tensor& dy, const at::Tensor& weight, const at::Tensor& counts,
                      std::string engine) {
  return grouped_gemm_dgrad(*engine_for(dy.device(), engine), dy.contiguous(), weight.contiguous(),
                            counts_from(counts));
}

at::Tensor gemm_wgrad(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& counts,
                      std::string engine) {
  return grouped_gemm_wgrad(*engine_for(dy.device(), engine), dy.contiguous(), x.contiguous(),
                            counts_from(counts));
}

void implement(Operators operators) {
  operators.impl("route_forward", route_forward);
  operators.impl("route_backward", route_backward);
  operators.impl("plan", plan);
  operators.impl("dispatch", dispatch);
  operators.impl("combine", combine);
  operators.impl("permute", permute_rows);
  operators.impl("unpermute", unpermute_rows);
  operators.impl("grouped_gemm", gemm);
  operators.impl("grouped_gemm_dgrad", gemm_dgrad);
  operators.impl("grouped_gemm_wgrad", gemm_wgrad);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(anabranch, library) {
  Operators operators(library);
  // They keep what a compiler's own CUDA graphs know nothing of, wait for the device, or read counts in host
  // memory, which a replay would not read again.
  const std::vector<at::Tag> not_recorded = {at::Tag::cudagraph_unsafe};
  operators.def(
      "route_forward(Tensor logits, int top_k, bool renormalize, bool needs_gradient) -> "
      "(Tensor weights, Tensor probability_sum, Tensor squared_logsumexp_sum, Tensor expert_ids, "
      "Tensor counts, Tensor state)",
      not_recorded);
  operators.def(
      "route(Tensor logits, int top_k, bool renormalize) -> (Tensor weights, Tensor "
      "probability_sum, Tensor squared_logsumexp_sum, Tensor expert_ids, Tensor counts)",
      route);
  operators.def("route_backward(Tensor[] gradients, Tensor state, Tensor logits) -> Tensor",
                not_recorded);
  operators.def(
      "plan(Tensor expert_ids, Tensor weights, int num_experts, str group, bool may_skip=False) "
      "-> Tensor[]",
      not_recorded);
  operators.def(
      "dispatch(Tensor rows, Tensor? values, Tensor[] plan, int top_k, int num_experts, str group) "
      "-> (Tensor rows, Tensor values)",
      not_recorded);
  operators.def(
      "combine(Tensor rows, Tensor? values, Tensor[] plan, int top_k, int num_experts, str group) "
      "-> (Tensor rows, Tensor values)",
      not_recorded);
  operators.def("permute(Tensor rows, Tensor[] plan) -> Tensor");
  operators.def("unpermute(Tensor assignments, Tensor? weights, Tensor[] plan) -> Tensor");
  operators.def("grouped_gemm(Tensor x, Tensor weight, Tensor counts, str engine) -> Tensor",
                not_recorded);
  operators.def("grouped_gemm_dgrad(Tensor dy, Tensor weight, Tensor counts, str engine) -> Tensor",
                not_recorded);
  operators.def("grouped_gemm_wgrad(Tensor dy, Tensor x, Tensor counts, str engine) -> Tensor",
                not_recorded);
}

TORCH_LIBRARY_IMPL(anabranch, CPU, library) { implement(Operators(library)); }
TORCH_LIBRARY_IMPL(anabranch, CUDA, library) { implement(Operators(library)); }

}  // namespace anabranch::operators
