#include "routing/auxiliary_losses.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>

#include "kernels/routing.h"
#include "support/given.h"
#include "support/single_backward.h"

namespace anabranch {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// A loss [] and its gradient in the batch's sums that it is made of, both fp64.
struct Loss {
  torch::Tensor value;
  torch::Tensor gradient;
};

/// Variance over squared mean of `sums` [E]; 0 where all are 0.
Loss squared_variation(const torch::Tensor& sums) {
  constexpr double kLeast = 1e-10;  // of the authors' code
  const auto mean = sums.mean();
  const auto apart = sums - mean;
  const auto divisor = mean.square() + kLeast;
  const auto value = apart.square().mean() / divisor;
  const double slope = 2.0 / static_cast<double>(sums.size(0));
  return {value, (apart - value * mean) / divisor * slope};
}

/// How many sums a routing of such a layer's own has.
int64_t count_sums(const MoEOptions& options) {
  const int64_t of_experts = options.gate == Gate::kNoisyTopK ? 4
                             : options.gate == Gate::kGShard  ? 3
                                                              : 2;
  return of_experts * options.num_experts + 2 + (options.sequence_balance_coefficient > 0 ? 2 : 0);
}

/// Of this rank's sequences: the gradient [S, E] of the sum of their losses, E / k · Σ_e counts ·
/// probability sum / tokens², in the probability sums; and [2] that sum, and how many are not padding
/// throughout. In fp64.
struct SequenceLosses {
  torch::Tensor slope;
  torch::Tensor sums;
};

SequenceLosses sequence_losses(const SequenceSums& sequences, int64_t top_k) {
  const auto tokens = sequences.tokens.to(torch::kFloat64).unsqueeze(1);  // [S, 1]
  const auto counts = sequences.counts.to(torch::kFloat64);
  const double scale = static_cast<double>(counts.size(1)) / static_cast<double>(top_k);
  const auto slope = counts * scale / tokens.clamp_min(1).square();
  const auto sum = (slope * sequences.probability_sum.detach().to(torch::kFloat64)).sum();
  return {slope, at::stack({sum, tokens.gt(0).sum().to(torch::kFloat64)})};
}

RoutingSums own_sums(const Routing& routing) {
  return {routing.probability_sum.detach().contiguous(), routing.squared_logsumexp_sum.detach()};
}

/// The batch's sums, in one fp64 vector: assignments of each expert [E]; unless the routing is from
/// outside, what else RoutingKernels::batch_sums has; then, of gates that have them, first choices [E],
/// importance [E], smooth load [E]; then of sequences two. Between ranks zeros make up for what a routing
/// from outside lacks.
torch::Tensor sums_of_batch(const Routing& routing, const torch::Tensor& counts,
                            const SequenceLosses& sequences, const MoEOptions& options,
                            Communicator& communicator) {
  std::vector<torch::Tensor> parts;
  if (routing.probability_sum.defined()) {
    parts.push_back(RoutingKernels::on(counts.device())
                        .batch_sums(counts, routing.expert_ids.size(0), own_sums(routing)));
    if (routing.num_tokens.defined()) {  // without the padding
      parts.back().select(0, counts.size(0)).copy_(routing.num_tokens);
    }
  } else {
    parts.push_back(counts.to(torch::kFloat64));
  }
  for (const auto& sum : {routing.first_counts, routing.importance, routing.smooth_load}) {
    if (sum.defined()) {
      parts.push_back(sum.detach().to(torch::kFloat64));
    }
  }
  if (sequences.sums.defined()) {
    parts.push_back(sequences.sums);
  }
  if (communicator.size() > 1 && !routing.probability_sum.defined()) {
    parts.push_back(at::zeros({count_sums(options) - counts.size(0)}, parts[0].options()));
  }
  auto sums = parts.size() == 1 ? parts[0] : at::cat(parts);
  communicator.all_reduce(sums);
  return sums;
}

/// As autograd takes them: the load, and behind it the losses that there are.
variable_list listed(const AuxiliaryLosses& losses) {
  variable_list list = {losses.expert_load};
  for (const auto& loss :
       {losses.balance_loss, losses.z_loss, losses.importance_loss, losses.load_loss,
        losses.sequence_balance_loss, losses.mean_probabilities}) {
    if (loss.defined()) list.push_back(loss);
  }
  return list;
}

bool wants_mean_probabilities(const Routing& routing, const MoEOptions& options) {
  return options.global_balance_coefficient > 0 && routing.probability_sum.defined();
}

/// What such a list was made of, for that routing.
AuxiliaryLosses from_list(const variable_list& list, const Routing& routing,
                          const MoEOptions& options) {
  AuxiliaryLosses losses;
  auto next = list.begin();
  losses.expert_load = *next++;
  if (routing.probability_sum.defined()) {
    losses.balance_loss = *next++;
    losses.z_loss = *next++;
  }
  if (routing.importance.defined()) {
    losses.importance_loss = *next++;
    losses.load_loss = *next++;
  }
  if (routing.sequences.probability_sum.defined()) {
    losses.sequence_balance_loss = *next++;
  }
  if (wants_mean_probabilities(routing, options)) {
    losses.mean_probabilities = *next++;
  }
  return losses;
}

/// Sums of this rank → AuxiliaryLosses, as a list.
struct LossesOfBatch : torch::autograd::Function<LossesOfBatch> {
  static variable_list forward(AutogradContext* context,
                               const std::optional<torch::Tensor>& /*probability_sum*/,
                               const std::optional<torch::Tensor>& /*squared_logsumexp_sum*/,
                               const std::optional<torch::Tensor>& /*importance*/,
                               const std::optional<torch::Tensor>& /*smooth_load*/,
                               const std::optional<torch::Tensor>& sequence_probability_sum,
                               const Routing* routing, const torch::Tensor* own_counts,
                               const MoEOptions* options, Communicator* communicator) {
    const int64_t experts = own_counts->size(0);
    const auto dtype = routing->weights.scalar_type();
    const bool first = routing->first_counts.defined();
    const bool by_scores = routing->probability_sum.defined();
    const bool has_sequences = sequence_probability_sum.has_value();
    const bool has_means = wants_mean_probabilities(*routing, *options);
    const bool no_sums = communicator->size() == 1 && by_scores && !first && !has_sequences &&
                         !has_means && !routing->importance.defined() &&
                         !routing->num_tokens.defined();  // the rank's own are the batch's
    const SequenceLosses of_sequences =
        has_sequences ? sequence_losses(routing->sequences, options->top_k) : SequenceLosses();
    const auto all =
        no_sums ? torch::Tensor()
                : sums_of_batch(*routing, *own_counts, of_sequences, *options, *communicator);
    const auto sums = has_sequences ? all.slice(0, 0, -2) : all;
    AuxiliaryLosses found;
    variable_list slopes;         // of the losses, in their order
    std::vector<int64_t> places;  // of the sums that each is the slope in, among the arguments
    if (by_scores) {
      const RoutingKernels& kernels = RoutingKernels::on(own_counts->device());
      const auto losses =
          no_sums ? kernels.losses_of_one(*own_counts, routing->expert_ids.size(0),
                                          own_sums(*routing), options->top_k)
                  : kernels.batch_losses(sums, sums.narrow(0, first ? 2 * experts + 2 : 0, experts),
                                         first ? 1 : options->top_k, dtype);
      found.expert_load = losses.expert_load;
      found.balance_loss = losses.balance;
      found.z_loss = losses.z;
      slopes = {losses.balance_slope, losses.z_slope};
      places = {0, 1};
    } else {
      found.expert_load = sums.narrow(0, 0, experts).to(torch::kInt64);
    }
    if (routing->importance.defined()) {
      const Loss load = squared_variation(sums.slice(0, sums.size(0) - experts));
      const Loss importance =
          squared_variation(sums.slice(0, sums.size(0) - 2 * experts, sums.size(0) - experts));
      found.importance_loss = importance.value.to(dtype);
      found.load_loss = load.value.to(dtype);
      slopes.insert(slopes.end(), {importance.gradient, load.gradient});
      places.insert(places.end(), {2, 3});
    }
    if (has_sequences) {
      const auto number = all.select(0, -1).clamp_min(1);
      found.sequence_balance_loss = (all.select(0, -2) / number).to(dtype);
      slopes.push_back(of_sequences.slope / number);
      places.push_back(4);
    }
    if (has_means) {
      const auto share = sums.select(0, experts).clamp_min(1).reciprocal();
      found.mean_probabilities = (sums.narrow(0, experts + 1, experts) * share).to(dtype);
      slopes.push_back(share);
      places.push_back(0);
    }
    context->saved_data["places"] = places;
    if (communicator->size() > 1) {  // the loss is the group's, its gradient's share this rank's
      for (auto& slope : slopes) slope = slope * communicator->size();
    }
    context->save_for_backward(std::move(slopes));
    context->set_materialize_grads(false);
    context->mark_non_differentiable({found.expert_load});
    return listed(found);
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    refuse_double_backward("auxiliary losses");
    const torch::NoGradGuard no_grad;
    const auto slopes = context->get_saved_variables();
    const auto places = context->saved_data["places"].toIntVector();
    variable_list result(9);  // as many as forward takes
    for (size_t i = 0; i < slopes.size(); ++i) {
      const auto& gradient = gradients[i + 1];  // behind the load's
      if (gradient.defined()) {
        const auto& shape = gradient.dim() > 0 ? gradient : slopes[i];
        auto of_sums = at::empty(shape.sizes(), gradient.options());
        at::mul_out(of_sums, slopes[i], gradient);  // in fp64, rounded once
        auto& sum = result[places[i]];
        sum = sum.defined() ? sum + of_sums : of_sums;
      }
    }
    return result;
  }
};

}  // namespace

AuxiliaryLosses auxiliary_losses(const Routing& routing, const torch::Tensor& counts,
                                 const MoEOptions& options, Communicator& communicator) {
  return from_list(
      LossesOfBatch::apply(given(routing.probability_sum), given(routing.squared_logsumexp_sum),
                           given(routing.importance), given(routing.smooth_load),
                           given(routing.sequences.probability_sum), &routing, &counts, &options,
                           &communicator),
      routing, options);
}

torch::Tensor weighted_sum(const AuxiliaryLosses& losses, const MoEOptions& options) {
  torch::Tensor sum;
  for (const auto& [loss, coefficient] :
       {std::pair{losses.balance_loss, options.balance_coefficient},
        std::pair{losses.sequence_balance_loss, options.sequence_balance_coefficient},
        std::pair{losses.z_loss, options.z_coefficient}}) {
    if (loss.defined() && coefficient != 0) {
      sum = sum.defined() ? sum + coefficient * loss : coefficient * loss;
    }
  }
  return sum;
}

}  // namespace anabranch
