#include <anabranch/communicator.h>
#include <anabranch/moe_layer.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>

#include "engine_agreement.h"
#include "exchange/late_refusals.h"
#include "experts/feed_forward.h"
#include "experts/permute.h"
#include "experts/shared_expert.h"
#include "moe_options.h"
#include "routing/auxiliary_losses.h"
#include "support/check.h"
#include "support/given.h"
#include "support/single_backward.h"
#include "support/stage.h"
#include "support/tensor_list.h"

namespace anabranch {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// What forward leaves for backward besides tensors.
struct Step : torch::CustomClassHolder {
  Step(const Exchange& exchange, ExchangePlan plan, FeedForward expert, WeightSums main_grad,
       bool recompute)
      : exchange(exchange),
        plan(std::move(plan)),
        expert(std::move(expert)),
        main_grad(std::move(main_grad)),
        recompute(recompute) {}

  Exchange exchange;
  ExchangePlan plan;
  FeedForward expert;
  WeightSums main_grad;
  bool recompute;
};

/// The tensors that backward needs.
struct Saved {
  torch::Tensor rows;             ///< [R, h]
  torch::Tensor routing_weights;  ///< [P]
  torch::Tensor hidden;           ///< [P, n or 2n]; undefined: to be computed again
  ExpertProjections experts;

  auto tensors() {
    return std::tuple_cat(std::tie(rows, routing_weights, hidden), tensors_of(experts));
  }
};

/// The way of the tokens through the experts of all ranks: x [T, h] and routing weights [T, top_k]
/// → y [T, h], and upstream again.
struct ThroughExperts : torch::autograd::Function<ThroughExperts> {
  static torch::Tensor forward(AutogradContext* context, const torch::Tensor& x,
                               const torch::Tensor& weights, const torch::Tensor& up_weight,
                               const torch::Tensor& down_weight,
                               const std::optional<torch::Tensor>& up_bias,
                               const std::optional<torch::Tensor>& down_bias,
                               const c10::intrusive_ptr<Step>& step) {
    const ExchangePlan& plan = step->plan;
    const ExpertProjections experts{projection(up_weight, up_bias),
                                    projection(down_weight, down_bias)};

    const auto [rows, routing_weights] = stage("anabranch.dispatch", [&] {
      return step->exchange.dispatch(
          {x, plan.checked_weights.defined() ? plan.checked_weights : weights}, plan);
    });
    const auto [results, hidden] = feed_forward(step->expert, permuted(rows, plan), experts,
                                                plan.expert_counts, !step->recompute);
    const auto sums =
        stage("anabranch.unpermute", [&] { return unpermute(results, routing_weights, plan); });
    const auto y = stage("anabranch.combine", [&] {
      return step->exchange.combine({sums, {}}, plan).rows;
    });

    context->save_for_backward(pack(Saved{rows, routing_weights, hidden, experts}));
    context->saved_data["step"] = torch::IValue::make_capsule(step);
    return y;
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    refuse_double_backward("MoELayer");
    const torch::NoGradGuard no_grad;
    const auto [rows, routing_weights, hidden, experts] =
        unpack<Saved>(context->get_saved_variables());
    const auto step =
        c10::static_intrusive_pointer_cast<Step>(context->saved_data["step"].toCapsule());
    const ExchangePlan& plan = step->plan;

    const auto dy_rows = stage("anabranch.combine.backward", [&] {
      return step->exchange.dispatch({gradients[0].contiguous(), {}}, plan).rows;
    });
    // Unless another backward is to read hidden again.
    const bool overwrite_hidden = !torch::autograd::get_current_graph_task_keep_graph();
    auto wanted = wanted_gradients(context, /*first=*/2, experts);
    wanted.sums = step->main_grad;
    const auto [gradients_of, drows, drouting_weights] = feed_forward_backward(
        step->expert, permuted(dy_rows, plan), permuted(rows, plan), hidden, routing_weights,
        experts, plan.expert_counts, overwrite_hidden, wanted);
    const auto dsums =
        stage("anabranch.permute.backward", [&] { return unpermute(drows, {}, plan); });
    const auto [dx, dweights] = stage("anabranch.dispatch.backward", [&] {
      return step->exchange.combine({dsums, drouting_weights}, plan);
    });

    return {dx,
            dweights,
            gradients_of.up.weight,
            gradients_of.down.weight,
            gradients_of.up.bias,
            gradients_of.down.bias,
            {}};
  }
};

/// All experts of a layer on this rank, with the rows of a step.
std::vector<Trial> trials_of(const MoEParameters& parameters, const ExchangePlan& plan,
                             int64_t tokens) {
  std::vector<Trial> trials = {{parameters.experts, parameters.main_grad, plan.expert_counts}};
  if (parameters.shared_expert.up.weight.defined()) {
    trials.push_back({parameters.shared_expert, {}, {tokens}});
  }
  return trials;
}

}  // namespace

MoEFunction::MoEFunction(const MoEOptions& options, std::shared_ptr<Communicator> communicator)
    : options_(checked(options)),
      exchange_(std::move(communicator), options.num_experts),
      engine_(make_grouped_gemm_engine(options.device, options.engine)) {}

MoEFunction::MoEFunction(const MoEOptions& options, const Exchange& exchange)
    : options_(checked(options)),
      exchange_(exchange),
      engine_(make_grouped_gemm_engine(options.device, options.engine)) {}

MoEFunction MoEFunction::with(torch::Dtype dtype, torch::Device device) const {
  MoEOptions options = options_;
  options.dtype = dtype;
  options.device = device;
  return {options, exchange_};
}

MoEOutput MoEFunction::forward(const MoEParameters& parameters, const torch::Tensor& x,
                               bool training) const {
  return forward(parameters, x,
                 route_tokens(layer_tokens(x, options_), parameters.router, options_, training));
}

MoEOutput MoEFunction::forward(const MoEParameters& parameters, const torch::Tensor& x,
                               const Routing& routing) const {
  const auto tokens = layer_tokens(x, options_);
  check_layer_routing(routing, tokens.size(0), options_);
  const FeedForward expert{engine_, options_.activation, options_.glu};
  Communicator& communicator = exchange_.communicator();
  const bool shared = parameters.shared_expert.up.weight.defined();
  auto plan = exchange_.begin_plan(routing, tokens, options_.errors);
  if (communicator.size() > 1 && !engine_->is_settled()) {
    settle_engine(expert, trials_of(parameters, plan.get(), tokens.size(0)), options_.recompute,
                  communicator);
  }
  // While the counts are on their way to the host: what needs none.
  std::optional<FeedForwardOutput> ahead;
  if (communicator.size() > 1 && shared) {
    const Stage named("anabranch.shared_expert");
    ahead = shared_expert_ahead(tokens, parameters.shared_expert, expert);
  }
  const auto losses = stage("anabranch.losses", [&] {
    return auxiliary_losses(routing, plan.source_counts(), options_.gate, communicator);
  });
  const auto step = c10::make_intrusive<Step>(exchange_, plan.get(), expert, parameters.main_grad,
                                              options_.recompute);
  const auto& [up, down] = parameters.experts;
  auto y = ThroughExperts::apply(tokens, routing.weights, up.weight, down.weight, given(up.bias),
                                 given(down.bias), step);
  if (shared) {
    const Stage named("anabranch.shared_expert");
    y = y +
        gated(through_shared_expert(tokens, parameters.shared_expert,
                                    parameters.shared_expert_main_grad, expert, std::move(ahead)),
              tokens, parameters.shared_expert_gate);
  }
  return {x.dim() == 2 ? y : y.view(x.sizes()),
          losses.balance_loss,
          losses.z_loss,
          losses.importance_loss,
          losses.load_loss,
          losses.expert_load};
}

MoELayerImpl::MoELayerImpl(const MoEOptions& options, std::shared_ptr<Communicator> communicator)
    : function_(options, agree_on_options(options, communicator ? std::move(communicator)
                                                                : make_self_communicator())) {
  const Exchange& exchange = function_.exchange();
  router_ = register_module("router", Router(options));
  experts_ = register_module(
      "experts", Experts(options, exchange.placement(), exchange.communicator().rank()));
  if (options.shared_expert_hidden_size > 0) {
    shared_expert_ = register_module("shared_expert", make_shared_expert(options));
  }
  if (options.shared_expert_gate) {
    shared_expert_gate_ =
        register_parameter("shared_expert_gate", make_shared_expert_gate(options));
  }
}

MoEParameters MoELayerImpl::parameters_of_modules() const {
  const bool shared = !shared_expert_.is_empty();
  return {router_->router_parameters(),
          experts_->projections(),
          experts_->main_grad,
          shared ? shared_expert_->projections() : ExpertProjections(),
          shared ? shared_expert_->main_grad : WeightSums(),
          shared_expert_gate_};
}

void MoELayerImpl::to(torch::Device device, torch::Dtype dtype, bool non_blocking) {
  auto moved = function_.with(dtype, device);
  Module::to(device, dtype, non_blocking);
  function_ = std::move(moved);
}

void MoELayerImpl::to(torch::Dtype dtype, bool non_blocking) {
  auto moved = function_.with(dtype, options().device);
  Module::to(dtype, non_blocking);
  function_ = std::move(moved);
}

void MoELayerImpl::to(torch::Device device, bool non_blocking) {
  auto moved = function_.with(options().dtype, device);
  Module::to(device, non_blocking);
  function_ = std::move(moved);
}

MoEOutput MoELayerImpl::forward(const torch::Tensor& x) {
  return function_.forward(parameters_of_modules(), x, is_training());
}

MoEOutput MoELayerImpl::forward(const torch::Tensor& x, const Routing& routing) {
  return function_.forward(parameters_of_modules(), x, routing);
}

void check() { check_late_refusals(); }

double imbalance(const torch::Tensor& expert_load) {
  check_input(expert_load.defined() && expert_load.dim() == 1 && expert_load.numel() > 0,
              "imbalance: expected the load of each expert, [E]");
  const double mean = expert_load.to(torch::kFloat64).mean().item<double>();
  return mean > 0 ? expert_load.max().item<double>() / mean : 1.0;
}

}  // namespace anabranch
