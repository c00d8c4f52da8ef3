// The whole layer as an operator. What it computes and how it is differentiated are the core's: the
// forward operator has the core's graph recorded, the backward operator runs it.

#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/custom_function.h>

#include <tuple>

#include "given.h"
#include "graph.h"
#include "losses.h"
#include "operators.h"
#include "parameters.h"
#include "probe.h"
#include "registry.h"
#include "routing/global_balance.h"
#include "support/check.h"
#include "support/given.h"
#include "support/observer.h"
#include "support/single_backward.h"
#include "support/tensor_list.h"

namespace anabranch::operators {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// What the layer's operators return: see MoEOutput.
struct Outputs {
  at::Tensor output;
  Losses losses;
  at::Tensor expert_load;
  at::Tensor expert_ids;      ///< empty of a routing from outside
  at::Tensor expert_weights;  ///< the same
  at::Tensor bias_histogram;  ///< empty where it is not wanted

  auto differentiable() { return std::tuple_cat(std::tie(output), losses.tensors()); }
  auto tensors() {
    return std::tuple_cat(differentiable(),
                          std::tie(expert_load, expert_ids, expert_weights, bias_histogram));
  }
};
using OutputTuple = TensorTuple<std::tuple_size_v<decltype(Outputs().tensors())>>;

/// Where the tokens go, as far as that comes from outside.
struct Given {
  const std::optional<at::Tensor>& expert_ids;  ///< [T, top_k]
  const std::optional<at::Tensor>& weights;  ///< [T, top_k]; without: the router's own of the ids
  const std::optional<at::Tensor>& padding_mask;  ///< one bool a token
  bool may_skip;                                  ///< ids may be −1
};

/// What moe_forward returns besides: see RecordedGraph.
struct OutputsAndState {
  Outputs outputs;
  at::Tensor state;

  auto tensors() { return std::tuple_cat(outputs.tensors(), std::tie(state)); }
};
using OutputAndStateTuple = TensorTuple<std::tuple_size_v<OutputTuple> + 1>;

/// Outputs with a gradient, which come first.
constexpr size_t kDifferentiable = std::tuple_size_v<decltype(Outputs().differentiable())>;

/// What a routing from outside is to be for the core.
Routing routing_from(const at::Tensor& expert_ids, const at::Tensor& weights, bool may_skip,
                     torch::Dtype dtype) {
  check_input(weights.is_floating_point(), "routing: weights are ", weights.scalar_type(),
              ", expected a floating type");
  Routing routing;
  routing.expert_ids = ids_from(expert_ids);
  routing.weights = weights.to(gate_type(dtype));
  routing.may_skip = may_skip;
  return routing;
}

/// Adds to a layer's probe what happens while this lives: traffic, and times where it wants them.
class Observing {
 public:
  Observing(const at::Tensor& probe, const Communicator& communicator, at::Device device)
      : probe_(probe_of(probe)),
        communicator_(communicator),
        before_(communicator.traffic()),
        measuring_(probe_ && probe_->timed ? &probe_->times : nullptr, device) {}
  ~Observing() {
    if (!probe_) return;
    const std::scoped_lock lock(probe_->mutex);
    probe_->bytes_sent += communicator_.traffic().bytes_sent - before_.bytes_sent;
    probe_->bytes_received += communicator_.traffic().bytes_received - before_.bytes_received;
    probe_->collectives += communicator_.traffic().collectives - before_.collectives;
  }
  Observing(const Observing&) = delete;
  Observing& operator=(const Observing&) = delete;

 private:
  std::shared_ptr<Probe> probe_;
  const Communicator& communicator_;
  Traffic before_;
  StageTimes::Measuring measuring_;
};

/// A layer's forward: by autograd's graph, where that is recorded.
MoEOutput run(const MoEFunction& function, const at::Tensor& x, at::TensorList parameters,
              const Given& given, bool training, bool losses, const at::Tensor& probe) {
  const auto counted = probe_of(probe);
  if (counted) {
    const std::scoped_lock lock(counted->mutex);
    ++counted->forwards;
  }
  const Communicator& communicator = function.exchange().communicator();
  const Observing observing(probe, communicator, x.device());
  MoEParameters all = parameters_from_list(parameters, function.options());
  check_input(given.weights.has_value() || all.router.weight.defined(),
              "moe: there is neither a router nor a routing from outside");
  const auto dtype = function.options().dtype;
  for (auto* tensor : {&all.router.weight, &all.router.noise_weight, &all.router.expert_bias}) {
    if (tensor->defined()) *tensor = tensor->to(gate_type(dtype));
  }
  auto output =
      given.weights.has_value()
          ? function.forward(
                all, x,
                routing_from(given.expert_ids.value(), *given.weights, given.may_skip, dtype),
                losses)
          : function.forward(all, x, training,
                             conditions_from(given.expert_ids, given.padding_mask), losses);
  if (counted) {
    const std::scoped_lock lock(counted->mutex);
    // What an operator returns is its caller's; a rank alone has the same once more.
    counted->expert_load =
        communicator.size() == 1 ? output.own_expert_load : output.expert_load.clone();
  }
  return output;
}

/// As the operators return them.
Outputs outputs_of(const MoEOutput& found, const at::Tensor& x, bool routed_here) {
  const auto empty = x.options().dtype(gate_type(x.scalar_type()));
  return {.output = found.output,
          .losses = Losses::of(found, empty),
          .expert_load = found.expert_load,
          .expert_ids = routed_here ? found.expert_ids : at::empty({0}, empty.dtype(at::kLong)),
          .expert_weights = routed_here ? found.expert_weights.detach() : at::empty({0}, empty),
          .bias_histogram = histogram_of(found, empty)};
}

/// The outputs and the graph from those of the inputs (x, weights, if given, and parameters) that
/// `needs_gradient` names.
OutputAndStateTuple moe_forward(const at::Tensor& x, at::TensorList parameters,
                                const std::optional<at::Tensor>& expert_ids,
                                const std::optional<at::Tensor>& weights,
                                const std::optional<at::Tensor>& padding_mask, bool may_skip,
                                std::string options, std::string group, bool training, bool losses,
                                const at::Tensor& probe, c10::List<bool> needs_gradient) {
  std::vector<at::Tensor> inputs = {x};
  if (weights.has_value()) inputs.push_back(*weights);
  inputs.insert(inputs.end(), parameters.begin(), parameters.end());
  TORCH_CHECK_VALUE(needs_gradient.size() == inputs.size(), "moe_forward: needs_gradient has ",
                    needs_gradient.size(), " values, expected ", inputs.size());
  RecordedGraph graph;
  for (size_t i = 0; i < inputs.size(); ++i) {
    inputs[i] = inputs[i].detach();
    if (needs_gradient[i]) graph.inputs.push_back(inputs[i].requires_grad_());
  }
  const auto leaves = at::TensorList(inputs).slice(inputs.size() - parameters.size());
  const auto function = function_for(options, group, leaves.back().scalar_type(), x.device());
  const auto own_weights = weights.has_value() ? std::optional(inputs[1]) : std::nullopt;

  const Recording recording(!graph.inputs.empty());
  auto outputs =
      outputs_of(run(*function, inputs[0], leaves,
                     {expert_ids, own_weights, padding_mask, may_skip}, training, losses, probe),
                 x, !weights.has_value());
  graph.function = function;
  leave(graph, outputs.differentiable());
  return OutputsAndState{.outputs = std::move(outputs), .state = as_tensor(std::move(graph))}
      .tensors();
}

/// The gradients of `inputs`: those that moe_forward was told of, in its order. `gradients` are of
/// its differentiable outputs.
/// One that is none costs nothing. `read`: other tensors that the state reads; whoever plans memory must see that
/// they are.
std::vector<at::Tensor> moe_backward(const c10::List<std::optional<at::Tensor>>& gradients,
                                     const at::Tensor& state, const at::Tensor& probe,
                                     at::TensorList inputs, at::TensorList /*read*/) {
  const RecordedGraph& graph = recorded_graph(state);
  TORCH_CHECK_VALUE(graph.inputs.size() == inputs.size(), "moe_backward: ", inputs.size(),
                    " inputs, expected the ", graph.inputs.size(), " of the forward");
  std::vector<at::Tensor> of_outputs;
  for (const size_t place : graph.places) {
    of_outputs.push_back(gradients.get(place).value_or(at::Tensor()));
  }
  const Observing observing(probe, graph.function->exchange().communicator(),
                            inputs.empty() ? at::kCPU : inputs[0].device());
  auto result = run_backward(graph, of_outputs);
  for (size_t i = 0; i < result.size(); ++i) {
    if (!result[i].defined()) result[i] = at::zeros_like(inputs[i]);
  }
  return result;
}

OutputsAndState call_forward(const at::Tensor& x, at::TensorList parameters, const Given& given,
                             const std::string& options, const std::string& group, bool training,
                             bool losses, const at::Tensor& probe,
                             const c10::List<bool>& needs_gradient) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("anabranch::moe_forward", "")
                             .typed<decltype(moe_forward)>();
  OutputsAndState found;
  found.tensors() =
      op.call(x, parameters, given.expert_ids, given.weights, given.padding_mask, given.may_skip,
              options, group, training, losses, probe, needs_gradient);
  return found;
}

std::vector<at::Tensor> call_backward(const c10::List<std::optional<at::Tensor>>& gradients,
                                      const at::Tensor& state, const at::Tensor& probe,
                                      at::TensorList inputs, at::TensorList read) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("anabranch::moe_backward", "")
                             .typed<decltype(moe_backward)>();
  return op.call(gradients, state, probe, inputs, read);
}

struct MoE : torch::autograd::Function<MoE> {
  static variable_list forward(AutogradContext* context, const at::Tensor& x,
                               const std::optional<at::Tensor>& weights, at::TensorList parameters,
                               const std::optional<at::Tensor>& expert_ids,
                               const std::optional<at::Tensor>& padding_mask, bool may_skip,
                               const std::string& options, const std::string& group, bool training,
                               bool losses, const at::Tensor& probe) {
    c10::List<bool> needs_gradient;
    variable_list inputs;
    variable_list read;           // without a gradient: saved, so that changes of them are noticed
    std::vector<int64_t> places;  // of the inputs' gradients among all that backward returns
    int64_t place = 0;
    const auto add = [&](const at::Tensor& input, bool used, bool is_read) {
      const bool needed = used && input.requires_grad();
      needs_gradient.push_back(needed);
      if (needed) {
        inputs.push_back(input);
        places.push_back(place);
      } else if (used && is_read) {
        read.push_back(input);
      }
      ++place;
    };
    add(x, true, true);
    if (weights.has_value()) {
      add(*weights, true, false);  // they travel, and what has arrived is read
    } else {
      ++place;
    }
    const size_t routers = num_router_tensors(parameters);
    for (size_t i = 0; i < parameters.size(); ++i) {
      const bool of_router = i < routers;
      const bool is_bias = of_router && parameters[i].dim() == 1;  // the choice alone reads it
      add(parameters[i], !of_router || !weights.has_value(), !is_bias);
    }

    const at::AutoDispatchBelowADInplaceOrView below;
    const auto [outputs, state] =
        call_forward(x, parameters, {expert_ids, weights, padding_mask, may_skip}, options, group,
                     training, losses, probe, needs_gradient);
    variable_list saved = {state, probe};
    saved.insert(saved.end(), inputs.begin(), inputs.end());
    saved.insert(saved.end(), read.begin(), read.end());
    if (padding_mask.has_value()) saved.push_back(*padding_mask);
    context->save_for_backward(std::move(saved));
    context->saved_data["places"] = places;
    context->saved_data["arguments"] = place + 8;
    context->mark_non_differentiable(
        {outputs.expert_load, outputs.expert_ids, outputs.expert_weights, outputs.bias_histogram});
    context->set_materialize_grads(false);  // a loss that nobody uses has no backward
    return pack(outputs);
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    refuse_double_backward("MoE");
    const auto places = context->saved_data["places"].toIntVector();
    const auto saved = context->get_saved_variables();
    const at::Tensor& state = saved[0];
    const at::Tensor& probe = saved[1];
    const auto tensors = at::TensorList(saved).slice(2);
    c10::List<std::optional<at::Tensor>> of_outputs;
    for (size_t i = 0; i < kDifferentiable; ++i) {
      of_outputs.push_back(given(gradients[i]));
    }
    const auto found = call_backward(of_outputs, state, probe, tensors.slice(0, places.size()),
                                     tensors.slice(places.size()));
    variable_list result(context->saved_data["arguments"].toInt());
    for (size_t i = 0; i < places.size(); ++i) result[places[i]] = found[i];
    return result;
  }
};

/// No gradient is wanted, or autograd is done.
OutputTuple moe(const at::Tensor& x, at::TensorList parameters,
                const std::optional<at::Tensor>& expert_ids,
                const std::optional<at::Tensor>& weights,
                const std::optional<at::Tensor>& padding_mask, bool may_skip, std::string options,
                std::string group, bool training, bool losses, const at::Tensor& probe) {
  const Recording recording(false);
  const auto function = function_for(options, group, parameters.back().scalar_type(), x.device());
  return outputs_of(run(*function, x, parameters, {expert_ids, weights, padding_mask, may_skip},
                        training, losses, probe),
                    x, !weights.has_value())
      .tensors();
}

/// As operators that pass on their state.
OutputTuple moe_traced(const at::Tensor& x, at::TensorList parameters, const Given& given,
                       const std::string& options, const std::string& group, bool training,
                       bool losses, const at::Tensor& probe, bool needs_gradient) {
  if (needs_gradient) {
    return unpack<Outputs>(MoE::apply(x, given.weights, parameters, given.expert_ids,
                                      given.padding_mask, given.may_skip, options, group, training,
                                      losses, probe))
        .tensors();
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  c10::List<bool> none;
  none.resize(1 + given.weights.has_value() + parameters.size(), false);
  return call_forward(x, parameters, given, options, group, training, losses, probe, none)
      .outputs.tensors();
}

OutputTuple moe_autograd(const at::Tensor& x, at::TensorList parameters,
                         const std::optional<at::Tensor>& expert_ids,
                         const std::optional<at::Tensor>& weights,
                         const std::optional<at::Tensor>& padding_mask, bool may_skip,
                         std::string options, std::string group, bool training, bool losses,
                         const at::Tensor& probe) {
  const auto needed = [](const at::Tensor& tensor) { return tensor.requires_grad(); };
  const bool needs_gradient =
      at::GradMode::is_enabled() && (needed(x) || (weights.has_value() && needed(*weights)) ||
                                     std::any_of(parameters.begin(), parameters.end(), needed));
  const Given given{expert_ids, weights, padding_mask, may_skip};
  if (is_traced(x) || is_traced(parameters)) {
    return moe_traced(x, parameters, given, options, group, training, losses, probe,
                      needs_gradient);
  }
  if (!needs_gradient) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return moe(x, parameters, expert_ids, weights, padding_mask, may_skip, std::move(options),
               std::move(group), training, losses, probe);
  }
  const c10::impl::ExcludeDispatchKeyGuard outside(c10::autocast_dispatch_keyset);
  const auto function = function_for(options, group, parameters.back().scalar_type(), x.device());
  const ObservedBackward observed(
      [probe, function, device = x.device()]() -> std::shared_ptr<void> {
        return std::make_shared<Observing>(probe, function->exchange().communicator(), device);
      });
  return outputs_of(run(*function, x, parameters, given, training, losses, probe), x,
                    !weights.has_value())
      .tensors();
}

/// Rows and experts in autocast's type, as linear layers are; the router keeps its own.
OutputTuple moe_autocast(const at::Tensor& x, at::TensorList parameters,
                         const std::optional<at::Tensor>& expert_ids,
                         const std::optional<at::Tensor>& weights,
                         const std::optional<at::Tensor>& padding_mask, bool may_skip,
                         std::string options, std::string group, bool training, bool losses,
                         const at::Tensor& probe) {
  const c10::impl::ExcludeDispatchKeyGuard outside(c10::autocast_dispatch_keyset);
  const auto device = x.device().type();
  const auto type = at::autocast::get_autocast_dtype(device);
  const size_t routers = num_router_tensors(parameters);
  auto cast = parameters.slice(0, routers).vec();
  for (const auto& parameter : parameters.slice(routers)) {
    cast.push_back(at::autocast::cached_cast(type, parameter, device));
  }
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("anabranch::moe", "").typed<decltype(moe)>();
  return op.call(at::autocast::cached_cast(type, x, device), cast, expert_ids, weights,
                 padding_mask, may_skip, std::move(options), std::move(group), training, losses,
                 probe);
}

at::Tensor add_to_load_of_step(at::Tensor before, const at::Tensor& own, bool training,
                               std::string replicas) {
  return load_of_step(before, own, training, group_named(replicas).get());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(anabranch, library) {
  Operators operators(library);
  // Jitter, noise and chance: who runs them again must give them the same generator. What the forward leaves for
  // the backward lies in memory that a compiler's own CUDA graphs (mode="reduce-overhead") know nothing of, and
  // which they would use again: they are to end before these operators and begin anew behind them.
  const std::vector<at::Tag> draws = {at::Tag::nondeterministic_seeded, at::Tag::cudagraph_unsafe};
  operators.def(
      "moe(Tensor x, Tensor[] parameters, Tensor? expert_ids, Tensor? weights, Tensor? "
      "padding_mask, bool may_skip, str options, str group, bool training, bool losses, Tensor "
      "probe) -> "
      "(Tensor "
      "output, Tensor balance_loss, Tensor z_loss, Tensor importance_loss, Tensor load_loss, "
      "Tensor "
      "sequence_balance_loss, Tensor auxiliary_loss, Tensor mean_probabilities, Tensor "
      "expert_load, Tensor expert_ids, Tensor expert_weights, Tensor bias_histogram)",
      draws);
  operators.def(
      "moe_forward(Tensor x, Tensor[] parameters, Tensor? expert_ids, Tensor? weights, Tensor? "
      "padding_mask, bool may_skip, str options, str group, bool training, bool losses, Tensor "
      "probe, bool[] "
      "needs_gradient) -> (Tensor output, Tensor balance_loss, Tensor z_loss, Tensor "
      "importance_loss, Tensor load_loss, Tensor sequence_balance_loss, Tensor auxiliary_loss, "
      "Tensor mean_probabilities, Tensor expert_load, Tensor expert_ids, Tensor expert_weights, "
      "Tensor bias_histogram, Tensor state)",
      draws);
  operators.def(
      "moe_backward(Tensor?[] gradients, Tensor state, Tensor probe, Tensor[] inputs, Tensor[] "
      "read) -> Tensor[]",
      {at::Tag::cudagraph_unsafe});
}

TORCH_LIBRARY_FRAGMENT(anabranch, library) {
  Operators operators(library);
  operators.def(
      "attach_loss(Tensor output, Tensor loss, Tensor? scale) -> Tensor",
      [](const at::Tensor& output, const at::Tensor& loss, const std::optional<at::Tensor>& scale) {
        return attach_loss(output, loss, scale.value_or(at::Tensor()));
      });
}

TORCH_LIBRARY_FRAGMENT(anabranch, library) {
  Operators operators(library);
  operators.def("global_balance_loss(Tensor mean_probabilities, Tensor load) -> Tensor",
                global_balance_loss);
  operators.def(
      "load_of_step(Tensor(a!) before, Tensor own, bool training, str replicas) -> Tensor",
      {at::Tag::cudagraph_unsafe});
  operators.def(
      "explain(str options, str group, ScalarType dtype, Device device) -> str",
      [](const std::string& options, const std::string& group, at::ScalarType dtype,
         at::Device device) { return function_for(options, group, dtype, device)->explain(); });
}

TORCH_LIBRARY_IMPL(anabranch, CPU, library) {
  Operators operators(library);
  operators.impl("moe", moe);
  operators.impl("moe_forward", moe_forward);
  operators.impl("moe_backward", moe_backward);
  operators.impl("load_of_step", add_to_load_of_step);
}
TORCH_LIBRARY_IMPL(anabranch, CUDA, library) {
  Operators operators(library);
  operators.impl("moe", moe);
  operators.impl("moe_forward", moe_forward);
  operators.impl("moe_backward", moe_backward);
  operators.impl("load_of_step", add_to_load_of_step);
}
TORCH_LIBRARY_IMPL(anabranch, Autograd, library) { Operators(library).impl("moe", moe_autograd); }
TORCH_LIBRARY_IMPL(anabranch, AutocastCPU, library) {
  Operators(library).impl("moe", moe_autocast);
}
TORCH_LIBRARY_IMPL(anabranch, AutocastCUDA, library) {
  Operators(library).impl("moe", moe_autocast);
}

}  // namespace anabranch::operators
