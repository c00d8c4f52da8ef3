#pragma once

#include <anabranch/options.h>
#include <anabranch/routing.h>
#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

namespace anabranch {

/// What a router computes with: undefined where its options have none.
struct RouterParameters {
  torch::Tensor weight;        ///< [E, h] fp32 (fp64 for fp64 layers)
  torch::Tensor noise_weight;  ///< the same, of the noise of Gate::kNoisyTopK
  torch::Tensor expert_bias;   ///< [E] of the weight's type, a buffer
};

/// Linear gate, scores, top-k: `options.gate` and what follows it. Ties go to the lowest expert.
/// Noise is drawn from LibTorch's generator of the device: the same seed, the same routing.
class RouterImpl : public torch::nn::Module {
 public:
  explicit RouterImpl(const MoEOptions& options);

  /// `x`: [T, h] of any floating type; the gate computes in fp32 (fp64 for fp64 input). `conditions` but
  /// for the bias, which is the router's own.
  Routing forward(const torch::Tensor& x, const RoutingConditions& conditions = {});

  /// As of any module, but for the type: fp64 with fp64, fp32 with any other.
  void to(torch::Device device, torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Dtype dtype, bool non_blocking = false) override;
  using Module::to;

  /// Adds `rate` to the bias of every expert with less than the mean of `expert_load` [E], takes it
  /// from those with more (arXiv:2408.15664, algorithm 1; DeepSeek-V3 trains with 0.001). The load is
  /// that of all ranks which hold this router, so that the bias stays the same on each.
  /// With BiasUpdate::kQuantile it is Routing::bias_histogram that is summed over a step's forwards and all ranks, and
  /// `rate`, at most 1, how much of the new biases is taken: 1 for all, less to smooth (Megatron-Core's 1 − ema).
  /// Throws InputError without `options.expert_bias`, and for another shape or rate.
  void update_expert_bias(const torch::Tensor& expert_load, double rate);

  RouterParameters router_parameters() const { return {weight, noise_weight, expert_bias}; }

  torch::Tensor weight;        ///< [E, h] fp32 (fp64 for fp64 layers)
  torch::Tensor noise_weight;  ///< the same, of the noise; undefined unless kNoisyTopK
  torch::Tensor expert_bias;   ///< [E] of the weight's type, a buffer; undefined without the option

 private:
  MoEOptions options_;
};
TORCH_MODULE(Router);

/// What Router does, with parameters that lie elsewhere. `training`: with jitter, noise and chance.
Routing route_tokens(const torch::Tensor& x, const RouterParameters& parameters,
                     const MoEOptions& options, bool training,
                     const RoutingConditions& conditions = {});

/// What Router::update_expert_bias does, with a bias that lies elsewhere.
void update_expert_bias(torch::Tensor& expert_bias, const torch::Tensor& expert_load, double rate);

/// The same of BiasUpdate::kQuantile. For each expert the (top_k / E)-quantile of what its bias would have had to be for
/// each token, that is the (top_k + 1)-th best biased score of the token less the expert's own score; less their
/// mean. Without tokens biases stay.
void update_expert_bias_by_quantile(torch::Tensor& expert_bias, const torch::Tensor& histogram,
                                    int64_t top_k, double rate);

/// Scores of given logits [T, E] (fp32 or fp64), the choice among them, the weights of those chosen:
/// w = routing_scale · s / (Σ of the chosen s + 10⁻²⁰) or routing_scale · s. `expert_bias` [E], of the
/// logits' type, is added to the scores for the choice alone. Differentiable in the logits.
/// OLMoE, Mixtral, Qwen3-MoE: softmax, renormalised or not. DeepSeek-V3: sigmoid, bias, groups, scale;
/// there an expert outside the chosen groups is never taken, however low the biased scores inside.
Routing route(const torch::Tensor& logits, const RoutingRule& rule,
              const torch::Tensor& expert_bias = {});

/// The same under any conditions.
Routing route(const torch::Tensor& logits, const RoutingRule& rule,
              const RoutingConditions& conditions);

/// Softmax and the top_k of it.
Routing route(const torch::Tensor& logits, int64_t top_k, bool renormalize);

}  // namespace anabranch
