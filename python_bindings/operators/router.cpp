// A layer's router as an operator of its own, for experts that are not the core's.

#include "given.h"
#include "graph.h"
#include "losses.h"
#include "operators.h"
#include "registry.h"
#include "support/tensor_list.h"

namespace anabranch::operators {
namespace {

/// What router_forward returns: see MoEOutput, and RecordedGraph for the state.
struct Routed {
  at::Tensor weights;
  Losses losses;
  at::Tensor expert_load;
  at::Tensor expert_ids;
  at::Tensor bias_histogram;
  at::Tensor state;

  auto differentiable() { return std::tuple_cat(std::tie(weights), losses.tensors()); }
  auto tensors() {
    return std::tuple_cat(differentiable(),
                          std::tie(expert_load, expert_ids, bias_histogram, state));
  }
};
using RoutedTuple = TensorTuple<std::tuple_size_v<decltype(Routed().tensors())>>;

/// What the core finds, but for the state.
Routed routed_by(const MoEFunction& function, const at::Tensor& x, const at::Tensor& weight,
                 const at::Tensor& noise_weight, const std::optional<at::Tensor>& expert_bias,
                 const RoutingConditions& conditions, bool training) {
  const auto of_type = [&](const at::Tensor& tensor) {
    return tensor.defined() ? tensor.to(gate_type(x.scalar_type())) : tensor;
  };
  const MoEOutput found = function.route(
      {of_type(weight), of_type(noise_weight), of_type(expert_bias.value_or(at::Tensor()))}, x,
      training, conditions);
  const auto empty = x.options().dtype(gate_type(x.scalar_type()));
  return {.weights = found.expert_weights,
          .losses = Losses::of(found, empty),
          .expert_load = found.expert_load,
          .expert_ids = found.expert_ids,
          .bias_histogram = histogram_of(found, empty),
          .state = {}};
}

RoutedTuple router_forward(const at::Tensor& x, const at::Tensor& weight,
                           const std::optional<at::Tensor>& noise_weight,
                           const std::optional<at::Tensor>& expert_bias,
                           const std::optional<at::Tensor>& expert_ids,
                           const std::optional<at::Tensor>& padding_mask, std::string options,
                           std::string group, bool training, bool needs_gradient) {
  const auto function = function_for(options, group, x.scalar_type(), x.device());
  RecordedGraph graph;
  const auto leaf = [&](const at::Tensor& tensor) {
    auto input = tensor.detach();
    if (needs_gradient) graph.inputs.push_back(input.requires_grad_());
    return input;
  };
  const auto rows = leaf(x);
  const auto own_weight = leaf(weight);
  const auto own_noise = noise_weight.has_value() ? leaf(*noise_weight) : at::Tensor();
  const Recording recording(needs_gradient);
  auto routed = routed_by(*function, rows, own_weight, own_noise, expert_bias,
                          conditions_from(expert_ids, padding_mask), training);
  graph.function = function;
  leave(graph, routed.differentiable());
  routed.state = as_tensor(std::move(graph));
  return routed.tensors();
}

/// The same in the caller's graph; the state is empty.
RoutedTuple router(const at::Tensor& x, const at::Tensor& weight,
                   const std::optional<at::Tensor>& noise_weight,
                   const std::optional<at::Tensor>& expert_bias,
                   const std::optional<at::Tensor>& expert_ids,
                   const std::optional<at::Tensor>& padding_mask, std::string options,
                   std::string group, bool training) {
  if (!is_traced({x, weight})) {
    const c10::impl::ExcludeDispatchKeyGuard outside(c10::autocast_dispatch_keyset);
    const auto function = function_for(options, group, x.scalar_type(), x.device());
    auto routed = routed_by(*function, x, weight, noise_weight.value_or(at::Tensor()), expert_bias,
                            conditions_from(expert_ids, padding_mask), training);
    routed.state = at::empty({0}, x.options().dtype(at::kByte));
    return routed.tensors();
  }
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("anabranch::router_forward", "")
                             .typed<decltype(router_forward)>();
  const bool needs_gradient =
      at::GradMode::is_enabled() && (x.requires_grad() || weight.requires_grad() ||
                                     (noise_weight.has_value() && noise_weight->requires_grad()));
  return op.call(x, weight, noise_weight, expert_bias, expert_ids, padding_mask, options, group,
                 training, needs_gradient);
}

/// Of x, the weight and the noise's weight, where there is one: in the order of `inputs`.
std::vector<at::Tensor> router_backward(at::TensorList gradients, const at::Tensor& state,
                                        at::TensorList inputs) {
  const RecordedGraph& graph = recorded_graph(state);
  std::vector<at::Tensor> of_outputs;
  for (const size_t place : graph.places) of_outputs.push_back(gradients[place]);
  auto result = run_backward(graph, of_outputs);
  for (size_t i = 0; i < result.size(); ++i) {
    if (!result[i].defined()) result[i] = at::zeros_like(inputs[i]);
  }
  return result;
}

void implement(Operators operators) {
  operators.impl("router_forward", router_forward);
  operators.impl("router_backward", router_backward);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(anabranch, library) {
  Operators operators(library);
  operators.def(
      "router_forward(Tensor x, Tensor weight, Tensor? noise_weight, Tensor? expert_bias, Tensor? "
      "expert_ids, Tensor? padding_mask, str options, str group, bool training, bool "
      "needs_gradient) -> (Tensor weights, Tensor balance_loss, Tensor z_loss, Tensor "
      "importance_loss, Tensor load_loss, Tensor sequence_balance_loss, Tensor auxiliary_loss, "
      "Tensor mean_probabilities, Tensor expert_load, Tensor expert_ids, Tensor bias_histogram, "
      "Tensor state)",
      {at::Tag::nondeterministic_seeded, at::Tag::cudagraph_unsafe});
  operators.def(
      "router(Tensor x, Tensor weight, Tensor? noise_weight, Tensor? expert_bias, Tensor? "
      "expert_ids, Tensor? padding_mask, str options, str group, bool training) -> (Tensor "
      "weights, Tensor balance_loss, Tensor z_loss, Tensor importance_loss, Tensor load_loss, "
      "Tensor sequence_balance_loss, Tensor auxiliary_loss, Tensor mean_probabilities, Tensor "
      "expert_load, Tensor expert_ids, Tensor bias_histogram, Tensor state)",
      router);
  operators.def("router_backward(Tensor[] gradients, Tensor state, Tensor[] inputs) -> Tensor[]",
                {at::Tag::cudagraph_unsafe});
}

TORCH_LIBRARY_IMPL(anabranch, CPU, library) { implement(Operators(library)); }
TORCH_LIBRARY_IMPL(anabranch, CUDA, library) { implement(Operators(library)); }

}  // namespace anabranch::operators
