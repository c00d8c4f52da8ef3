// A layer's router as an operator of its own, for experts that are not the core's.

#include <torch/library.h>

#include "given.h"
#include "graph.h"
#include "registry.h"
#include "support/tensor_list.h"

namespace anabranch::operators {
namespace {

/// What router_forward returns: see MoEOutput. Losses that there are not are empty.
struct Routed {
  at::Tensor weights;
  at::Tensor balance_loss;
  at::Tensor z_loss;
  at::Tensor importance_loss;
  at::Tensor load_loss;
  at::Tensor sequence_balance_loss;
  at::Tensor auxiliary_loss;
  at::Tensor expert_load;
  at::Tensor expert_ids;
  at::Tensor state;

  auto tensors() {
    return std::tie(weights, balance_loss, z_loss, importance_loss, load_loss,
                    sequence_balance_loss, auxiliary_loss, expert_load, expert_ids, state);
  }
};
using RoutedTuple = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                               at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

RoutedTuple router_forward(const at::Tensor& x, const at::Tensor& weight,
                           const std::optional<at::Tensor>& noise_weight,
                           const std::optional<at::Tensor>& expert_bias,
                           const std::optional<at::Tensor>& expert_ids,
                           const std::optional<at::Tensor>& padding_mask, std::string options,
                           std::string group, bool training, bool needs_gradient) {
  const auto function = function_for(options, group, x.scalar_type(), x.device());
  const auto of_gate = gate_type(x.scalar_type());
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
  const auto of_type = [&](const at::Tensor& tensor) {
    return tensor.defined() ? tensor.to(of_gate) : tensor;
  };
  const MoEOutput routed = function->route(
      {of_type(own_weight), of_type(own_noise), of_type(expert_bias.value_or(at::Tensor()))}, rows,
      training, conditions_from(expert_ids, padding_mask));
  graph.function = function;
  const std::vector<at::Tensor> differentiable = {
      routed.expert_weights,  routed.balance_loss, routed.z_loss,
      routed.importance_loss, routed.load_loss,    routed.sequence_balance_loss,
      routed.auxiliary_loss};
  for (size_t place = 0; place < differentiable.size(); ++place) {
    if (differentiable[place].defined() && differentiable[place].requires_grad()) {
      graph.outputs.push_back(torch::autograd::impl::gradient_edge(differentiable[place]));
      graph.places.push_back(place);
    }
  }
  const auto empty = x.options().dtype(of_gate);
  return Routed{.weights = routed.expert_weights.detach(),
                .balance_loss = defined_or_empty(routed.balance_loss, empty),
                .z_loss = defined_or_empty(routed.z_loss, empty),
                .importance_loss = defined_or_empty(routed.importance_loss, empty),
                .load_loss = defined_or_empty(routed.load_loss, empty),
                .sequence_balance_loss = defined_or_empty(routed.sequence_balance_loss, empty),
                .auxiliary_loss = defined_or_empty(routed.auxiliary_loss, empty),
                .expert_load = routed.expert_load,
                .expert_ids = routed.expert_ids,
                .state = as_tensor(std::move(graph))}
      .tensors();
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

void implement(torch::Library& library) {
  library.impl("router_forward", router_forward);
  library.impl("router_backward", router_backward);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(anabranch, library) {
  library.def(
      "router_forward(Tensor x, Tensor weight, Tensor? noise_weight, Tensor? expert_bias, Tensor? "
      "expert_ids, Tensor? padding_mask, str options, str group, bool training, bool "
      "needs_gradient) -> (Tensor weights, Tensor balance_loss, Tensor z_loss, Tensor "
      "importance_loss, Tensor load_loss, Tensor sequence_balance_loss, Tensor auxiliary_loss, "
      "Tensor expert_load, Tensor expert_ids, Tensor state)",
      {at::Tag::nondeterministic_seeded, at::Tag::cudagraph_unsafe});
  library.def("router_backward(Tensor[] gradients, Tensor state, Tensor[] inputs) -> Tensor[]",
              {at::Tag::cudagraph_unsafe});
}

TORCH_LIBRARY_IMPL(anabranch, CPU, library) { implement(library); }
TORCH_LIBRARY_IMPL(anabranch, CUDA, library) { implement(library); }

}  // namespace anabranch::operators
