#include <ATen/ATen.h>
#include <anabranch/experts.h>
#include <anabranch/optimizers.h>

#include <algorithm>

#include "finished_gradients.h"

namespace anabranch {
namespace {

bool is_reduced(const torch::Tensor& tensor) {
  return at::isReducedFloatingType(tensor.scalar_type());
}

/// Experts' weights of 16 bits get the sums that the layer's backward adds to.
void give_main_gradients(ExpertsImpl& experts) {
  const auto zeros = [](const torch::Tensor& weight) {
    return at::zeros_like(weight, weight.options().dtype(at::kFloat).requires_grad(false));
  };
  auto& [up, down] = experts.main_grad;
  if (is_reduced(experts.up_weight) && experts.up_weight.requires_grad() && !up.defined()) {
    up = zeros(experts.up_weight);
  }
  if (is_reduced(experts.down_weight) && experts.down_weight.requires_grad() && !down.defined()) {
    down = zeros(experts.down_weight);
  }
}

/// That layers add to it themselves: then there is no grad().
void add_gradient(const ParallelParameter& parameter) {
  auto& gradient = parameter.tensor.mutable_grad();
  if (!parameter.main_grad.defined() || !gradient.defined()) return;
  auto sum = parameter.main_grad;
  sum.add_(gradient);
  gradient.reset();
}

}  // namespace

std::vector<ParallelParameter> trained_parameters(torch::nn::Module& model,
                                                  const ParallelGroups& groups) {
  const at::NoGradGuard no_grad;
  model.apply([](torch::nn::Module& module) {
    if (auto* experts = dynamic_cast<ExpertsImpl*>(&module)) give_main_gradients(*experts);
  });
  auto parameters = parallel_parameters(model, groups);
  std::erase_if(parameters,
                [](const auto& parameter) { return !parameter.tensor.requires_grad(); });
  for (auto& parameter : parameters) {
    if (!is_reduced(parameter.tensor) || parameter.main_grad.defined()) continue;
    parameter.main_grad = at::zeros_like(
        parameter.tensor, parameter.tensor.options().dtype(at::kFloat).requires_grad(false));
  }
  return parameters;
}

void accumulate_gradients(const std::vector<ParallelParameter>& parameters) {
  const at::NoGradGuard no_grad;
  for (const auto& parameter : parameters) add_gradient(parameter);
}

void zero_gradients(const std::vector<ParallelParameter>& parameters) {
  const at::NoGradGuard no_grad;
  std::vector<torch::Tensor> sums;
  for (const auto& parameter : parameters) {
    if (parameter.main_grad.defined()) {
      sums.push_back(parameter.main_grad);
    } else {
      parameter.tensor.mutable_grad().reset();
    }
  }
  if (!sums.empty()) at::_foreach_zero_(sums);
  mark_unfinished(sums);
}

Gradients gradients_of(const std::vector<ParallelParameter>& parameters) {
  const at::NoGradGuard no_grad;
  Gradients gradients;
  for (const auto& parameter : parameters) {
    auto& gradient = parameter.tensor.mutable_grad();
    if (!parameter.main_grad.defined() && !gradient.defined()) {
      gradient = at::zeros_like(parameter.tensor);
    }
    (parameter.is_expert ? gradients.experts : gradients.replicated)
        .push_back(parameter.gradient());
  }
  return gradients;
}

}  // namespace anabranch
