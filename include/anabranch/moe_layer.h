#pragma once

#include <anabranch/exchange.h>
#include <anabranch/experts.h>
#include <anabranch/grouped_gemm.h>
#include <anabranch/router.h>

#include <map>
#include <memory>
#include <string>

namespace anabranch {

class Balancer;
class StageTimes;

/// What a layer's forward finds.
struct MoEOutput {
  torch::Tensor output;  ///< the input's shape and type
  /// Auxiliary losses of the group's whole batch: equal on every rank, and meant to be added to each
  /// rank's loss with the same coefficient. Undefined when the routing was handed in, and in an evaluation
  /// (`MoELayerImpl::set_evaluation_losses`).
  /// [] E · Σ_e f_e · P_e with f_e the share of all assignments that went to expert e and P_e its mean
  /// probability: 1 in perfect balance (Switch Transformer, arXiv:2101.03961, eq. 4). With
  /// Gate::kGShard f_e counts best experts only: E² times the loss of GShard's algorithm 1.
  torch::Tensor balance_loss;
  torch::Tensor z_loss;  ///< [] mean_t logsumexp(logits[t])² (ST-MoE, arXiv:2202.08906, eq. 5)
  /// Gate::kNoisyTopK only: the squared coefficient of variation, variance over squared mean, of the
  /// experts' importance (sums of weights) and smooth load (arXiv:1701.06538, eq. 7 and 11). [], 0 in
  /// perfect balance. Without noise the load is that of the assignments, without gradient.
  torch::Tensor importance_loss;
  torch::Tensor load_loss;  ///< [] that of the smooth load
  /// [E] int64: assignments of each expert over all ranks of the group; where losses were not summed, of this
  /// rank's tokens.
  torch::Tensor expert_load;
  /// [E] int64: those of this rank's tokens, before the exchange.
  torch::Tensor own_expert_load;
  /// [] mean over the group's sequences of E · Σ_e f_e · P_e, as balance_loss but of each alone; one that is
  /// padding throughout is none. Undefined without `sequence_balance_coefficient`.
  torch::Tensor sequence_balance_loss;
  /// [] Σ of the losses that have a coefficient, times it; undefined where none has.
  torch::Tensor auxiliary_loss;
  /// Where this rank's tokens went: [T, top_k] int64, −1 for none, and the weights, differentiable.
  torch::Tensor expert_ids;
  torch::Tensor expert_weights;  ///< [T, top_k] fp32 (fp64)
  /// [E] P_e, the mean probability of each expert over the group's tokens, differentiable as the losses are.
  /// Undefined without `global_balance_coefficient`.
  torch::Tensor mean_probabilities;
  /// [] E · Σ_e F_e · P_e with F_e the share of all assignments that went to expert e since the step began: in all
  /// forwards in training, and over all replicas of the experts (arXiv:2501.11873; Megatron-Core's
  /// global_aux_loss). A forward that a backward runs again is not counted again. Of MoELayer alone, which keeps the
  /// load, with `global_balance_coefficient`.
  torch::Tensor global_balance_loss;
  /// [E, kBiasBins] int64 of this rank's tokens, with BiasUpdate::kQuantile in training: see Routing.
  torch::Tensor bias_histogram;
};

/// What a layer computes with: undefined where its options have none.
struct MoEParameters {
  RouterParameters router;             ///< the same on all ranks, as all but the experts is
  ExpertProjections experts;           ///< of this rank
  WeightSums main_grad;                ///< see ExpertsImpl
  ExpertProjections shared_expert;     ///< of one expert
  WeightSums shared_expert_main_grad;  ///< its, as main_grad
  torch::Tensor shared_expert_gate;    ///< [1, h] of the layer's type
  torch::Tensor latent_down;           ///< [latent_size, h] of the layer's type
  torch::Tensor latent_up;             ///< [h, latent_size]
};

class OverlapChoice;

/// A layer whose parameters lie elsewhere: MoELayer, and the operators of other languages, are made
/// of it. Its calls are collective, as those of MoELayer.
class MoEFunction {
 public:
  /// The ranks' options are taken to agree. Throws InputError for options that no layer can have. Collective with a
  /// `cross_node_limit` alone.
  MoEFunction(const MoEOptions& options, std::shared_ptr<Communicator> communicator);

  /// `x`: [..., h] of the layer's type and device. `training`: with the router's jitter, noise and
  /// chance. Of `conditions` the choice and the padding are taken, for the tokens in row-major order.
  /// `sums_losses`: whether losses and load are summed over the ranks, all of which must do alike: those that do
  /// not are told so on every rank. Not false with a `receive_capacity`.
  MoEOutput forward(const MoEParameters& parameters, const torch::Tensor& x, bool training,
                    const RoutingConditions& conditions = {}, bool sums_losses = true) const;
  /// With routing from outside.
  MoEOutput forward(const MoEParameters& parameters, const torch::Tensor& x, const Routing& routing,
                    bool sums_losses = true) const;
  /// What forward finds out before experts come into it: no output. For experts of one's own, to which rows
  /// then go by Exchange.
  MoEOutput route(const RouterParameters& parameters, const torch::Tensor& x, bool training,
                  const RoutingConditions& conditions = {}) const;

  /// The same for rows of that type on that device.
  MoEFunction with(torch::Dtype dtype, torch::Device device) const;

  /// What travelled in the last step, tokens or weights, in how many rounds, and why.
  std::string explain() const;

  /// Experts lie so from the next forward on; their parameters are the caller's to move. On all ranks alike.
  void place(const ExpertPlacement& placement);

  const MoEOptions& options() const { return options_; }
  const Exchange& exchange() const { return exchange_; }

 private:
  MoEFunction(const MoEOptions& options, const Exchange& exchange, std::vector<int> nodes);
  Routing routing_of(const RouterParameters& parameters, const torch::Tensor& x, bool training,
                     RoutingConditions conditions) const;
  void find_near_experts();
  MoEOutput through_layer(const MoEParameters& parameters, const torch::Tensor& x,
                          const Routing& routing, bool sums_losses) const;
  /// Of the step that begins: see Exchange::begin_plan.
  double capacity() const;

  MoEOptions options_;
  Exchange exchange_;
  std::shared_ptr<GroupedGemmEngine> engine_;
  std::shared_ptr<OverlapChoice> overlap_;
  std::shared_ptr<Balancer> balancer_;
  std::vector<int> nodes_;      ///< [W] of each rank; empty without a cross_node_limit
  torch::Tensor near_experts_;  ///< see RoutingConditions, on the layer's device
};

/// `output` as it is; where its gradient passes, `loss` [] gets the gradient `scale` ([]; undefined: 1).
torch::Tensor attach_loss(const torch::Tensor& output, const torch::Tensor& loss,
                          const torch::Tensor& scale = {});

/// Fullest expert's assignments over the mean: 1 is perfect balance.
double imbalance(const torch::Tensor& expert_load);

/// A Mixture-of-Experts feed-forward layer whose experts are spread over a communicator's ranks.
///
/// Construction is collective: it checks that every rank was given the same options and throws
/// CommunicationError naming the rank and the field that differ. So are forward and backward:
/// every rank takes part in each, also with zero tokens.
class MoELayerImpl : public torch::nn::Module {
 public:
  /// `communicator`: the expert-parallel group; none for a single process.
  explicit MoELayerImpl(const MoEOptions& options,
                        std::shared_ptr<Communicator> communicator = nullptr);

  /// `x`: [..., h] of the layer's type and device; leading sizes may differ between ranks and be 0.
  MoEOutput forward(const torch::Tensor& x, const RoutingConditions& conditions = {});
  /// The same with routing from outside, for the tokens of `x` in row-major order.
  MoEOutput forward(const torch::Tensor& x, const Routing& routing);

  /// Moves the parameters, as of any module; the layer then takes rows of that type and device. The
  /// router's stay in fp32 (fp64 with fp64). Refuses what a layer cannot be of and is then unchanged. No
  /// communication: every rank is to do the same.
  void to(torch::Device device, torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Device device, bool non_blocking = false) override;

  /// The router's, for the `expert_load` of a step; in data parallelism summed over
  /// `ParallelGroups::expert_replicas` by the caller. No communication.
  void update_expert_bias(const torch::Tensor& expert_load, double rate) {
    router_->update_expert_bias(expert_load, rate);
  }

  /// With BiasUpdate::kQuantile: the same by the forwards in training since the step began, over all ranks of `world`. See
  /// Router::update_expert_bias for `rate`. Collective.
  void update_expert_bias(Communicator& world, double rate);

  /// The ranks that hold copies of this rank's experts, over which the load of `global_balance_loss` is summed as well;
  /// none: there are no copies. Forwards in training are then collective over them.
  void set_expert_replicas(std::shared_ptr<Communicator> replicas) {
    expert_replicas_ = std::move(replicas);
  }
  /// What the layer keeps of a step's forwards, for the global balance loss and for the biases, begins anew.
  void begin_step();

  /// [] what the losses that `attach_losses` attaches are multiplied by: a loss scaler's number, over the
  /// number of micro-batches. Undefined: 1.
  void set_attached_loss_scale(const torch::Tensor& scale) { attached_loss_scale_ = scale; }

  /// Whether a forward in eval mode sums losses and load over the ranks; at first not, which spares a collective.
  /// The same on all ranks. With a `receive_capacity` they are summed in any mode.
  void set_evaluation_losses(bool summed) { evaluation_losses_ = summed; }

  /// What travelled in the last step, tokens or weights, in how many rounds, and why.
  std::string explain() const { return function_.explain(); }

  /// Begins to measure how long the stages of this layer's steps take, or ends it. Costs a few microseconds a
  /// stage.
  void measure_stages(bool measured = true);
  /// Seconds of each stage since then, on the host, or on a GPU between what the stage puts on the stream, for
  /// which this waits; empty unless measured. "anabranch.route" to "anabranch.combine", backward's with
  /// ".backward"; within them, over several ranks, "anabranch.exchange", from when rows set out until they are
  /// known to have come, and of that "anabranch.exchange.exposed", in which nothing else was done.
  std::map<std::string, double> stage_seconds() const;

  /// Experts lie so from the next forward on, as many on each rank as before; the rows of their parameters are the
  /// caller's to move, which ExpertMover does. Of layers that do not lie in blocks. On all ranks alike.
  void place(const ExpertPlacement& placement);

  const MoEOptions& options() const { return function_.options(); }
  const Exchange& exchange() const { return function_.exchange(); }
  /// Those of this rank.
  const Experts& experts() const { return experts_; }
  /// The same on all ranks; empty without the option.
  const Experts& shared_expert() const { return shared_expert_; }

 private:
  MoEParameters parameters_of_modules() const;
  bool sums_losses() const;
  /// Adds to what is kept of the step, and to the losses what comes of it.
  void keep(MoEOutput& out);

  MoEFunction function_;
  Router router_{nullptr};
  Experts experts_{nullptr};
  Experts shared_expert_{nullptr};
  torch::Tensor shared_expert_gate_;  ///< [1, h], undefined without the option
  torch::Tensor latent_down_;         ///< [latent_size, h], undefined without the option
  torch::Tensor latent_up_;           ///< [h, latent_size]
  torch::Tensor attached_loss_scale_;
  std::shared_ptr<Communicator> expert_replicas_;  ///< null: none
  torch::Tensor step_load_;       ///< [E] int64; undefined before the first forward
  torch::Tensor step_histogram_;  ///< [E, kBiasBins] int64; the same
  bool evaluation_losses_ = false;
  std::shared_ptr<StageTimes> stage_times_;  ///< null: not measured
};
TORCH_MODULE(MoELayer);

/// Waits for what the layers of this process have launched on GPUs, and throws the error of a step that was
/// refused there: InputError for its routing (see Errors::kLate), on several ranks without counts of the
/// host's CommunicationError for another rank's, CapacityError (see MoEOptions::receive_capacity).
/// `finish_gradients` does so as well. Where a stream is recorded into a graph nothing is waited for.
void check();

/// The same, but says whether a capacity was exceeded, on all ranks of a layer alike, which is then no error.
bool take_exceeded_capacity();

/// While it lives, the layers that this thread calls have room for whatever comes, and wait for counts.
class Unbounded {
 public:
  Unbounded();
  ~Unbounded();
  Unbounded(const Unbounded&) = delete;
  Unbounded& operator=(const Unbounded&) = delete;
  /// Whether there is one.
  static bool lives();
};

/// What `step` returns, a graph's replay for one; or, if a capacity was exceeded in it, what `again` returns, in
/// which none is. `again` is to compute all of the step anew, from gradients that it sets to zero itself.
template <typename Step, typename Again>
auto run(const Step& step, const Again& again) {
  auto result = step();
  if (!take_exceeded_capacity()) {
    return result;
  }
  const Unbounded unbounded;
  return again();
}

}  // namespace anabranch
