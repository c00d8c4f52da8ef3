#include "routing/auxiliary_losses.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <torch/csrc/autograd/custom_function.h>

#include "support/given.h"

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

/// The batch's sums, in one fp64 vector: assignments of each expert [E], tokens [1] and, unless the
/// routing is from outside, probability sums [E], sum of squared logsumexp [1]; then, of gates that have
/// them, first choices [E], importance [E], smooth load [E].
class BatchSums {
 public:
  BatchSums(const Routing& routing, const torch::Tensor& counts, Communicator& communicator) {
    const auto tokens = static_cast<double>(routing.expert_ids.size(0));
    std::vector<torch::Tensor> parts = {
        counts, at::full({1}, tokens, counts.options().dtype(torch::kFloat64))};
    for (const auto& sum : {routing.probability_sum, routing.squared_logsumexp_sum,
                            routing.first_counts, routing.importance, routing.smooth_load}) {
      if (sum.defined()) {
        parts.push_back(sum.detach().reshape(-1));
      }
    }
    sums_ = at::cat(parts);
    communicator.all_reduce(sums_);
  }

  torch::Tensor next(int64_t length) {
    begin_ += length;
    return sums_.narrow(0, begin_ - length, length);
  }

 private:
  torch::Tensor sums_;
  int64_t begin_ = 0;
};

/// Sums of this rank → expert_load, then the losses that there are of balance, z, importance, load.
struct LossesOfBatch : torch::autograd::Function<LossesOfBatch> {
  static variable_list forward(AutogradContext* context,
                               const std::optional<torch::Tensor>& /*probability_sum*/,
                               const std::optional<torch::Tensor>& /*squared_logsumexp_sum*/,
                               const std::optional<torch::Tensor>& /*importance*/,
                               const std::optional<torch::Tensor>& /*smooth_load*/,
                               const Routing* routing, const torch::Tensor* own_counts,
                               Communicator* communicator) {
    const int64_t experts = own_counts->size(0);
    BatchSums sums(*routing, *own_counts, *communicator);
    auto counts = sums.next(experts);
    variable_list outputs = {counts.to(torch::kInt64)};
    const auto tokens = sums.next(1).squeeze(0).clamp_min(1);  // none at all: losses are 0
    std::vector<Loss> losses;
    if (routing->probability_sum.defined()) {
      const auto probability = sums.next(experts);
      const auto squared_logsumexp = sums.next(1).squeeze(0);
      auto assignments_of_token = static_cast<double>(routing->expert_ids.size(1));
      if (routing->first_counts.defined()) {
        counts = sums.next(experts);
        assignments_of_token = 1;
      }
      const auto slope =
          counts * (static_cast<double>(experts) / assignments_of_token) / tokens.square();
      losses.push_back({(slope * probability).sum(), slope});
      losses.push_back({squared_logsumexp / tokens, tokens.reciprocal()});
    }
    if (routing->importance.defined()) {
      losses.push_back(squared_variation(sums.next(experts)));
      losses.push_back(squared_variation(sums.next(experts)));
    }
    variable_list gradients;
    for (const auto& loss : losses) {
      outputs.push_back(loss.value.to(routing->weights.scalar_type()));
      gradients.push_back(loss.gradient);
    }
    context->save_for_backward(std::move(gradients));
    context->saved_data["ranks"] = static_cast<int64_t>(communicator->size());
    context->mark_non_differentiable({outputs[0]});
    return outputs;
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const torch::NoGradGuard no_grad;
    const auto slopes = context->get_saved_variables();
    const int64_t ranks = context->saved_data["ranks"].toInt();
    variable_list result(7);  // as many as forward takes
    for (size_t i = 0; i < slopes.size(); ++i) {
      const auto& gradient = gradients[i + 1];
      result[i] = (slopes[i] * gradient).mul_(ranks).to(gradient.scalar_type());
    }
    return result;
  }
};

}  // namespace

AuxiliaryLosses auxiliary_losses(const Routing& routing, const torch::Tensor& counts,
                                 Communicator& communicator) {
  auto outputs = LossesOfBatch::apply(
      given(routing.probability_sum), given(routing.squared_logsumexp_sum),
      given(routing.importance), given(routing.smooth_load), &routing, &counts, &communicator);
  AuxiliaryLosses losses;
  losses.expert_load = outputs[0];
  if (outputs.size() > 1) {
    losses.balance_loss = outputs[1];
    losses.z_loss = outputs[2];
  }
  if (outputs.size() > 3) {
    losses.importance_loss = outputs[3];
    losses.load_loss = outputs[4];
  }
  return losses;
}

}  // namespace anabranch
