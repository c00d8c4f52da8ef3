#include <ATen/ops/ones_like.h>
#include <anabranch/communicator.h>
#include <anabranch/moe_layer.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/nn/functional/linear.h>

#include <algorithm>
#include <initializer_list>
#include <iterator>
#include <optional>
#include <vector>

#include "balance/balancer.h"
#include "balance/lending.h"
#include "balance/split_routing.h"
#include "communicator/errors.h"
#include "engine_agreement.h"
#include "exchange/chunks.h"
#include "exchange/late_refusals.h"
#include "exchange/moving.h"
#include "exchange/rounds.h"
#include "experts/feed_forward.h"
#include "experts/latent.h"
#include "experts/permute.h"
#include "experts/shared_expert.h"
#include "experts_in_rounds.h"
#include "kernels/rows.h"
#include "moe_options.h"
#include "overlap_choice.h"
#include "placement/nodes.h"
#include "placement/slices.h"
#include "routing/auxiliary_losses.h"
#include "routing/global_balance.h"
#include "support/check.h"
#include "support/given.h"
#include "support/observer.h"
#include "support/single_backward.h"
#include "support/stage.h"
#include "support/stage_times.h"
#include "support/tensor_list.h"

namespace anabranch {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// What forward leaves for backward besides tensors: of the plan the counts.
struct Step : torch::CustomClassHolder {
  Step(const Exchange& exchange, ExchangePlan plan, FeedForward expert, WeightSums main_grad,
       bool recompute, std::shared_ptr<OverlapChoice> overlap, OverlapChoice::Way way)
      : exchange(exchange),
        plan(std::move(plan)),
        expert(std::move(expert)),
        main_grad(std::move(main_grad)),
        recompute(recompute),
        overlap(std::move(overlap)),
        way(way),
        travel(way.degree > 0 ? Travel::kBeside : Travel::kInTurn) {}

  Exchange exchange;
  ExchangePlan plan;
  FeedForward expert;
  WeightSums main_grad;
  bool recompute;
  std::shared_ptr<OverlapChoice> overlap;
  OverlapChoice::Way way;
  Travel travel;
  std::optional<Dispatching> dispatching;  ///< of the tokens, in forward
  std::shared_ptr<const Observer> observer = backward_observer();

  void start_dispatch(const torch::Tensor& x) {
    const Stage named("anabranch.dispatch");
    dispatching.emplace(exchange.communicator(), Payload{x, {}}, plan, travel);
  }

  Dispatching dispatch(const Payload& payload, const ExchangePlan& plan) const {
    return {exchange.communicator(), payload, plan, travel};
  }
  Combining combine(const ExchangePlan& plan) const {
    return {exchange.communicator(), plan, travel};
  }
};

/// The rows' places in a plan, which are as long as its rows and assignments.
auto places_of(ExchangePlan& plan) {
  return std::tie(plan.send_tokens, plan.token_offsets, plan.token_rows, plan.send_order,
                  plan.received_order, plan.assignment_rows, plan.row_offsets,
                  plan.row_assignments);
}

/// The counts of `plan`, without what belongs to its rows and assignments.
ExchangePlan counts_of(ExchangePlan plan) {
  std::apply([](auto&... places) { ((places = torch::Tensor()), ...); }, places_of(plan));
  plan.checked_weights = plan.local_weights = plan.source_counts = torch::Tensor();
  return plan;
}

/// The rows of `dispatching` on their way in, those that `go_on` sends with `combining` on their way out.
template <typename Output, typename GoOn>
Pipeline<Output> pipeline_between(const Step& step, const char* name, Dispatching& dispatching,
                                  const GoOn& go_on) {
  Pipeline<Output> pipeline;
  for (const ExchangeChunk& chunk : chunks_of(step.plan)) {
    pipeline.chunks.push_back({chunk.first_assignment, chunk.assignments});
  }
  pipeline.wait_for_next = [&dispatching, name] {
    stage(name, [&] { dispatching.wait_for_next(); });
  };
  pipeline.go_on = [go_on, chunk = int64_t{0}](const Output& output) mutable {
    go_on(chunk++, output);
  };
  pipeline.weights_last = step.travel == Travel::kBeside;
  return pipeline;
}

/// The tensors that backward needs.
struct Saved {
  torch::Tensor rows;             ///< [R, h]
  torch::Tensor routing_weights;  ///< [P]
  torch::Tensor hidden;           ///< [P, n or 2n]; undefined: to be computed again
  ExpertProjections experts;
  ExchangePlan plan;  ///< its places

  auto tensors() {
    return std::tuple_cat(std::tie(rows, routing_weights, hidden), tensors_of(experts),
                          places_of(plan));
  }
};

/// Makes what a step was to find NaN if its plan says so.
void spoil(const ExchangePlan& plan, std::initializer_list<torch::Tensor> found) {
  if (!plan.spoilt.defined()) {
    return;
  }
  std::vector<torch::Tensor> tensors;
  std::copy_if(found.begin(), found.end(), std::back_inserter(tensors),
               [](const auto& tensor) { return tensor.defined() && tensor.numel() > 0; });
  RowKernels::on(plan.spoilt.device()).spoil(tensors, plan.spoilt);
}

/// The way of the tokens through the experts of all ranks: x [T, h] and routing weights [T, top_k]
/// → y [T, h], and upstream again.
struct ThroughExperts : torch::autograd::Function<ThroughExperts> {
  static torch::Tensor forward(AutogradContext* context, const torch::Tensor& x,
                               const torch::Tensor& /*weights*/, const torch::Tensor& up_weight,
                               const torch::Tensor& down_weight,
                               const std::optional<torch::Tensor>& up_bias,
                               const std::optional<torch::Tensor>& down_bias,
                               const c10::intrusive_ptr<Step>& step) {
    const ExchangePlan& plan = step->plan;
    const ExpertProjections experts{projection(up_weight, up_bias),
                                    projection(down_weight, down_bias)};

    if (!step->dispatching.has_value()) {
      step->start_dispatch(x);
    }
    Dispatching& dispatching = *step->dispatching;
    Combining combining = step->combine(plan);
    const auto rows = dispatching.received().rows;
    const auto& routing_weights = plan.local_weights;
    const auto pipeline = pipeline_between<FeedForwardOutput>(
        *step, "anabranch.dispatch", dispatching,
        [&](int64_t chunk, const FeedForwardOutput& output) {
          const auto sums = stage("anabranch.unpermute", [&] {
            return unpermute(output.results, routing_weights, plan, chunk);
          });
          stage("anabranch.combine", [&] { combining.send({sums, {}}); });
        });
    const auto hidden = feed_forward(step->expert, permuted(rows, plan), experts,
                                     plan.expert_counts, !step->recompute, pipeline)
                            .hidden;
    const auto y = stage("anabranch.combine", [&] { return combining.finish().rows; });
    spoil(plan, {y});

    context->save_for_backward(pack(Saved{rows, routing_weights, hidden, experts, plan}));
    step->dispatching.reset();
    step->plan = counts_of(std::move(step->plan));
    context->saved_data["step"] = torch::IValue::make_capsule(step);
    return y;
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    refuse_double_backward("MoELayer");
    const auto step =
        c10::static_intrusive_pointer_cast<Step>(context->saved_data["step"].toCapsule());
    return with_failure_first(step->exchange.communicator(),
                              [&] { return upstream(context, gradients, step); });
  }

 private:
  static variable_list upstream(AutogradContext* context, const variable_list& gradients,
                                const c10::intrusive_ptr<Step>& step) {
    const torch::NoGradGuard no_grad;
    auto [rows, routing_weights, hidden, experts, places] =
        unpack<Saved>(context->get_saved_variables());
    const auto observed = begin(step->observer);
    ExchangePlan plan = step->plan;
    places_of(plan) = places_of(places);

    const auto dy = gradients[0].contiguous();
    auto begin = OverlapChoice::begin(step->way, dy.device());
    auto dispatching = stage("anabranch.combine.backward", [&] {
      return step->dispatch({dy, {}}, plan);
    });
    Combining combining = step->combine(plan);
    const auto chunks = static_cast<int64_t>(chunks_of(plan).size());
    const auto pipeline = pipeline_between<FeedForwardGradient>(
        *step, "anabranch.combine.backward", dispatching,
        [&](int64_t chunk, const FeedForwardGradient& gradient) {
          const auto dsums = stage("anabranch.permute.backward",
                                   [&] { return unpermute(gradient.dx, {}, plan, chunk); });
          const bool last = chunk + 1 == chunks;
          stage("anabranch.dispatch.backward", [&] {
            combining.send({dsums, last ? gradient.drouting_weights : torch::Tensor()});
          });
        });
    // Unless another backward is to read hidden again.
    const bool overwrite_hidden = !torch::autograd::get_current_graph_task_keep_graph();
    auto wanted = wanted_gradients(context, /*first=*/2, experts);
    wanted.sums = step->main_grad;
    const auto gradients_of =
        feed_forward_backward(step->expert, permuted(dispatching.received().rows, plan),
                              permuted(rows, plan), hidden, routing_weights, experts,
                              plan.expert_counts, overwrite_hidden, wanted, pipeline)
            .parameters;
    const auto [dx, dweights] =
        stage("anabranch.dispatch.backward", [&] { return combining.finish(); });
    spoil(plan, {dx, dweights, gradients_of.up.weight, gradients_of.down.weight,
                 gradients_of.up.bias, gradients_of.down.bias});
    step->overlap->note(step->way, /*backward=*/true, std::move(begin), dy.device());

    return {dx,
            dweights,
            gradients_of.up.weight,
            gradients_of.down.weight,
            gradients_of.up.bias,
            gradients_of.down.bias,
            {}};
  }
};

/// Tokens of lent experts, and the experts of this step.
struct Lent {
  SplitRouting split;
  Borrowed borrowed;
};

/// Decides what travels. Where weights do, `plan` becomes that of the tokens that go to owners, and the others
/// are returned. `beside`: weights travel while other things are done, where they can. Collective.
std::optional<Lent> let_weights_travel(Balancer& balancer, const Exchange& exchange,
                                       const MoEParameters& parameters, const FeedForward& expert,
                                       const Routing& routing, const torch::Tensor& rows,
                                       PendingPlan& plan, bool beside) {
  if (!balancer.is_on()) {
    return std::nullopt;
  }
  Communicator& communicator = exchange.communicator();
  const auto counts = communicator.all_gather(plan.source_counts());
  plan.get();
  const auto& loans = balancer.choose(counts.cpu(), expert, parameters.experts, communicator).loans;
  if (loans.empty()) {
    return std::nullopt;
  }
  auto lane = beside ? balancer.lane(communicator, rows.device()) : nullptr;
  auto borrowed = borrow(parameters.experts, parameters.main_grad, loans, exchange, rows,
                         routing.weights, std::move(lane));
  auto split = split_routing(routing, loans, exchange);
  plan = exchange.begin_plan(split.owned, rows);
  return Lent{std::move(split), std::move(borrowed)};
}

/// As ThroughExperts, to the borrowers. `noted`: the rounds of the other tokens, which become the most of both.
torch::Tensor through_borrowers(const torch::Tensor& x, const Lent& lent, const FeedForward& expert,
                                const MoEOptions& options,
                                const std::shared_ptr<OverlapChoice>& overlap, int64_t& noted) {
  const Exchange& exchange = *lent.split.exchange;
  const auto& experts = lent.borrowed.experts;
  const auto& sums = lent.borrowed.sums;
  const Routing& routing = lent.split.lent;
  auto plan = exchange.plan(routing, x);
  const int64_t rounds = count_rounds(plan, options.receive_rows_limit, exchange.communicator());
  noted = std::max(noted, rounds);
  const auto weights = exchange.slot_weights(routing.weights);
  if (rounds > 1) {
    return through_experts_in_rounds(x, weights, experts, sums, expert, exchange,
                                     in_rounds(plan, rounds));
  }
  const auto step = c10::make_intrusive<Step>(exchange, std::move(plan), expert, sums,
                                              options.recompute, overlap, OverlapChoice::Way());
  return ThroughExperts::apply(x, weights, experts.up.weight, experts.down.weight,
                               given(experts.up.bias), given(experts.down.bias), step);
}

/// The sequences that lie along the last dimension before h, or all tokens as one.
int64_t sequences_of(const torch::Tensor& x, int64_t tokens) {
  const int64_t length = x.dim() >= 3 ? x.size(-2) : tokens;
  return length > 0 ? std::max<int64_t>(tokens / length, 1) : 1;
}

MoEOutput output_of(const torch::Tensor& output, const Routing& routing,
                    const AuxiliaryLosses& losses, const torch::Tensor& own_expert_load,
                    const MoEOptions& options) {
  return {output,
          losses.balance_loss,
          losses.z_loss,
          losses.importance_loss,
          losses.load_loss,
          losses.expert_load,
          own_expert_load,
          losses.sequence_balance_loss,
          weighted_sum(losses, options),
          routing.expert_ids,
          routing.weights,
          losses.mean_probabilities,
          {},
          routing.bias_histogram};
}

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
      exchange_(communicator, placement_of(options, communicator->size())),
      engine_(make_grouped_gemm_engine(options.device, options.engine)),
      overlap_(std::make_shared<OverlapChoice>(options)),
      balancer_(std::make_shared<Balancer>(options, exchange_.placement())) {
  check_receive_rows_limit(options_, exchange_.communicator().size());
  if (options_.cross_node_limit > 0) {
    nodes_ = nodes_of_ranks(*communicator);
    find_near_experts();
  }
}

MoEFunction::MoEFunction(const MoEOptions& options, const Exchange& exchange,
                         std::vector<int> nodes)
    : options_(checked(options)),
      exchange_(exchange),
      engine_(make_grouped_gemm_engine(options.device, options.engine)),
      overlap_(std::make_shared<OverlapChoice>(options)),
      balancer_(std::make_shared<Balancer>(options, exchange_.placement())),
      nodes_(std::move(nodes)) {
  find_near_experts();
}

void MoEFunction::find_near_experts() {
  if (!nodes_.empty()) {
    near_experts_ = experts_of_node(exchange_.placement(), nodes_, exchange_.communicator().rank())
                        .to(options_.device);
  }
}

MoEFunction MoEFunction::with(torch::Dtype dtype, torch::Device device) const {
  MoEOptions options = options_;
  options.dtype = dtype;
  options.device = device;
  return {options, exchange_, nodes_};
}

Routing MoEFunction::routing_of(const RouterParameters& parameters, const torch::Tensor& x,
                                bool training, RoutingConditions conditions) const {
  const auto tokens = layer_tokens(x, options_);
  const bool by_sequences =
      options_.sequence_balance_coefficient > 0 || options_.gate == Gate::kExpertChoice;
  conditions.sequences = by_sequences ? sequences_of(x, tokens.size(0)) : 0;
  if (!conditions.near_experts.defined()) {
    conditions.near_experts = near_experts_;
  }
  return route_tokens(tokens, parameters, options_, training, conditions);
}

MoEOutput MoEFunction::forward(const MoEParameters& parameters, const torch::Tensor& x,
                               bool training, const RoutingConditions& conditions,
                               bool sums_losses) const {
  return forward(parameters, x, routing_of(parameters.router, x, training, conditions),
                 sums_losses);
}

MoEOutput MoEFunction::route(const RouterParameters& parameters, const torch::Tensor& x,
                             bool training, const RoutingConditions& conditions) const {
  const Routing routing = routing_of(parameters, x, training, conditions);
  const Stage named("anabranch.losses");
  return output_of({}, routing,
                   auxiliary_losses(routing, routing.counts, options_, exchange_.communicator()),
                   routing.counts, options_);
}

double MoEFunction::capacity() const { return Unbounded::lives() ? 0 : options_.receive_capacity; }

MoEOutput MoEFunction::forward(const MoEParameters& parameters, const torch::Tensor& x,
                               const Routing& routing, bool sums_losses) const {
  return with_failure_first(exchange_.communicator(),
                            [&] { return through_layer(parameters, x, routing, sums_losses); });
}

MoEOutput MoEFunction::through_layer(const MoEParameters& parameters, const torch::Tensor& x,
                                     const Routing& routing, bool sums_losses) const {
  const auto tokens = layer_tokens(x, options_);
  check_layer_routing(routing, tokens.size(0), options_);
  const FeedForward expert{
      engine_, {options_.activation, options_.glu, options_.activation_limit, options_.glu_offset}};
  Communicator& communicator = exchange_.communicator();
  const bool shared = parameters.shared_expert.up.weight.defined();
  const bool latent = parameters.latent_down.defined();
  const auto rows = latent ? torch::linear(tokens, parameters.latent_down) : tokens;
  auto plan = exchange_.begin_plan(routing, rows, options_.errors, capacity(), sums_losses);
  const auto source_counts = plan.source_counts();
  if (communicator.size() > 1 && !engine_->is_settled()) {
    settle_engine(expert, trials_of(parameters, plan.get(), tokens.size(0)), options_.recompute,
                  communicator);
  }
  // While the counts are on their way to the host: what needs none. On CPUs they are there.
  const auto way = overlap_->begin_step(communicator, tokens.device());
  const int64_t degree = way.degree;
  auto begin = OverlapChoice::begin(way, tokens.device());
  std::optional<FeedForwardOutput> ahead;
  const auto compute_ahead = [&] {
    const Stage named("anabranch.shared_expert");
    ahead = shared_expert_ahead(tokens, parameters.shared_expert, expert);
  };
  if (communicator.size() > 1 && shared && (degree == 0 || tokens.is_cuda())) {
    compute_ahead();
  }
  const auto losses = stage("anabranch.losses", [&] {
    if (sums_losses || plan.any_sums_losses()) {  // whoever does is to come through, and hear of it
      return auxiliary_losses(routing, source_counts, options_, communicator);
    }
    AuxiliaryLosses none;
    none.expert_load = source_counts;
    return none;
  });
  auto lent = let_weights_travel(*balancer_, exchange_, parameters, expert, routing, rows, plan,
                                 /*beside=*/degree > 0);
  // Rows in one piece that nothing is left to compute beside set out while the plan is made.
  const bool with_plan =
      options_.receive_rows_limit == 0 && (degree == 0 || (degree == 1 && (!shared || ahead)));
  const auto received = with_plan && !plan.is_made() ? plan.dispatch(rows) : torch::Tensor();
  int64_t rounds = count_rounds(plan.get(), options_.receive_rows_limit, communicator);
  const auto experts =
      lent ? lent->borrowed.own
           : with_biases_once(parameters.experts, exchange_.placement(), communicator.rank());
  const auto& main_grad = lent ? lent->borrowed.main_grad : parameters.main_grad;
  const auto& [up, down] = experts;
  const auto weights = exchange_.slot_weights(routing.weights);
  torch::Tensor y;
  if (rounds > 1) {
    y = through_experts_in_rounds(rows, weights, experts, main_grad, expert, exchange_,
                                  in_rounds(plan.get(), rounds));
  } else {
    const auto step =
        c10::make_intrusive<Step>(exchange_,
                                  in_chunks(plan.get(), std::max<int64_t>(degree, 1),
                                            exchange_.placement(), communicator.rank()),
                                  expert, main_grad, options_.recompute, overlap_, way);
    if (received.defined()) {
      step->dispatching.emplace(step->plan, received);
    }
    if (degree > 0 && shared && !ahead) {
      step->start_dispatch(rows);
      compute_ahead();  // while rows travel
    }
    y = ThroughExperts::apply(rows, weights, up.weight, down.weight, given(up.bias),
                              given(down.bias), step);
  }
  const bool at_once = rounds == 1;
  if (lent.has_value()) {
    y = await_borrowed(y, lent->borrowed);
    if (lent->split.exchange.has_value()) {
      y = y + through_borrowers(rows, *lent, expert, options_, overlap_, rounds);
    }
  }
  if (at_once) {
    overlap_->note(way, /*backward=*/false, std::move(begin), tokens.device());
  }
  balancer_->note_rounds(rounds);
  if (latent) {
    y = torch::linear(y, parameters.latent_up);
  }
  if (shared) {
    const Stage named("anabranch.shared_expert");
    y = y +
        gated(through_shared_expert(tokens, parameters.shared_expert,
                                    parameters.shared_expert_main_grad, expert, std::move(ahead)),
              tokens, parameters.shared_expert_gate);
  }
  return output_of(x.dim() == 2 ? y : y.view(x.sizes()), routing, losses, source_counts, options_);
}

std::string MoEFunction::explain() const { return balancer_->explain(); }

void MoEFunction::place(const ExpertPlacement& placement) {
  options_.placement = placement.describe();
  exchange_ = exchange_.with(placement);
  balancer_->place(placement);
  find_near_experts();
}

namespace {

/// y → y; loss → its gradient, `scale` or 1, where y's passes.
struct AttachedLoss : torch::autograd::Function<AttachedLoss> {
  static torch::Tensor forward(AutogradContext* context, const torch::Tensor& output,
                               const torch::Tensor& loss,
                               const std::optional<torch::Tensor>& scale) {
    context->save_for_backward({scale.value_or(at::ones_like(loss))});
    return output.view_as(output);
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    return {gradients[0], context->get_saved_variables()[0], {}};
  }
};

}  // namespace

torch::Tensor attach_loss(const torch::Tensor& output, const torch::Tensor& loss,
                          const torch::Tensor& scale) {
  check_input(output.defined() && loss.defined() && loss.dim() == 0,
              "attach_loss: expected an output and a loss []");
  std::optional<torch::Tensor> of_loss;
  if (scale.defined()) {
    check_input(scale.numel() == 1, "attach_loss: the scale is ", scale.sizes(),
                ", expected one number");
    of_loss = scale.detach().to(loss.device(), loss.scalar_type()).reshape({});
  }
  return AttachedLoss::apply(output, loss, of_loss);
}

namespace {

/// While it lives, the stages of a forward, and of the backward that is recorded, are added to `times`, if there are
/// any.
class MeasuredStep {
 public:
  MeasuredStep(const std::shared_ptr<StageTimes>& times, const torch::Tensor& x) {
    if (times == nullptr || !x.defined()) return;  // that is refused where it is used
    const auto device = x.device();
    forward_.emplace(times.get(), device);
    // Who runs the backward keeps this observer, and so the times, until it is done.
    backward_.emplace(
        [times, device] { return std::make_shared<StageTimes::Measuring>(times.get(), device); });
  }

 private:
  std::optional<StageTimes::Measuring> forward_;
  std::optional<ObservedBackward> backward_;
};

}  // namespace

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
  if (options.latent_size > 0) {
    const auto [down, up] = make_latent_projections(options);
    latent_down_ = register_parameter("latent_down", down);
    latent_up_ = register_parameter("latent_up", up);
  }
}

void MoELayerImpl::place(const ExpertPlacement& placement) {
  experts_->place(placement);
  function_.place(placement);
}

MoEParameters MoELayerImpl::parameters_of_modules() const {
  const bool shared = !shared_expert_.is_empty();
  return {router_->router_parameters(),
          experts_->projections(),
          experts_->main_grad,
          shared ? shared_expert_->projections() : ExpertProjections(),
          shared ? shared_expert_->main_grad : WeightSums(),
          shared_expert_gate_,
          latent_down_,
          latent_up_};
}

bool MoELayerImpl::sums_losses() const {
  return is_training() || evaluation_losses_ || options().receive_capacity > 0;
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

void MoELayerImpl::measure_stages(bool measured) {
  stage_times_ = measured ? std::make_shared<StageTimes>() : nullptr;
}

std::map<std::string, double> MoELayerImpl::stage_seconds() const {
  return stage_times_ == nullptr ? std::map<std::string, double>() : stage_times_->seconds();
}

MoEOutput MoELayerImpl::forward(const torch::Tensor& x, const RoutingConditions& conditions) {
  const MeasuredStep measured(stage_times_, x);
  auto out =
      function_.forward(parameters_of_modules(), x, is_training(), conditions, sums_losses());
  keep(out);
  if (options().attach_losses && is_training()) {
    out.output = attach_loss(out.output, out.auxiliary_loss, attached_loss_scale_);
  }
  return out;
}

void MoELayerImpl::keep(MoEOutput& out) {
  if (out.mean_probabilities.defined()) {
    if (!step_load_.defined()) step_load_ = torch::zeros_like(out.expert_load);
    const auto load =
        load_of_step(step_load_, out.expert_load, is_training(), expert_replicas_.get());
    out.global_balance_loss = global_balance_loss(out.mean_probabilities, load);
    const auto loss = options().global_balance_coefficient * out.global_balance_loss;
    out.auxiliary_loss = out.auxiliary_loss.defined() ? out.auxiliary_loss + loss : loss;
  }
  if (out.bias_histogram.defined() && !is_recomputing()) {
    step_histogram_ = step_histogram_.defined() ? step_histogram_ + out.bias_histogram
                                                : out.bias_histogram.clone();
  }
}

void MoELayerImpl::begin_step() {
  step_load_.reset();
  step_histogram_.reset();
}

void MoELayerImpl::update_expert_bias(Communicator& world, double rate) {
  check_input(options().expert_bias_update == BiasUpdate::kQuantile,
              "update_expert_bias: the layer's biases follow a load, expected one");
  auto histogram = step_histogram_.defined()
                       ? step_histogram_
                       : torch::zeros({options().num_experts, kBiasBins},
                                      router_->expert_bias.options().dtype(torch::kInt64));
  step_histogram_.reset();
  world.all_reduce(histogram);
  router_->update_expert_bias(histogram, rate);
}

MoEOutput MoELayerImpl::forward(const torch::Tensor& x, const Routing& routing) {
  const MeasuredStep measured(stage_times_, x);
  return function_.forward(parameters_of_modules(), x, routing, sums_losses());
}

void check() { check_late_refusals(); }

bool take_exceeded_capacity() { return take_exceeded_rooms(); }

namespace {
thread_local int unbounded = 0;
}  // namespace

Unbounded::Unbounded() { ++unbounded; }
Unbounded::~Unbounded() { --unbounded; }
bool Unbounded::lives() { return unbounded > 0; }

double imbalance(const torch::Tensor& expert_load) {
  check_input(expert_load.defined() && expert_load.dim() == 1 && expert_load.numel() > 0,
              "imbalance: expected the load of each expert, [E]");
  const double mean = expert_load.to(torch::kFloat64).mean().item<double>();
  return mean > 0 ? expert_load.max().item<double>() / mean : 1.0;
}

}  // namespace anabranch
