#include "optimizer.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <vector>

namespace train_lm {
namespace {

constexpr double kBeta1 = 0.9;
constexpr double kBeta2 = 0.95;
constexpr double kLastPart = 0.1;  // of the peak learning rate

}  // namespace

std::unique_ptr<torch::optim::AdamW> make_optimizer(const torch::nn::Module& model,
                                                    const TrainingOptions& options) {
  std::vector<torch::Tensor> matrices, vectors;
  for (const auto& parameter : model.parameters()) {
    (parameter.dim() > 1 ? matrices : vectors).push_back(parameter);
  }
  const auto defaults = torch::optim::AdamWOptions(options.learning_rate).betas({kBeta1, kBeta2});
  const auto with_decay = [&](double decay) {
    auto group = std::make_unique<torch::optim::AdamWOptions>(defaults);
    group->weight_decay(decay);
    return group;
  };
  std::vector<torch::optim::OptimizerParamGroup> groups;
  groups.emplace_back(matrices, with_decay(options.weight_decay));
  groups.emplace_back(vectors, with_decay(0));
  return std::make_unique<torch::optim::AdamW>(groups, defaults);
}

double learning_rate_at(int64_t step, const TrainingOptions& options) {
  if (step <= options.warmup) {
    return options.learning_rate * static_cast<double>(step) / static_cast<double>(options.warmup);
  }
  const auto after_warmup = static_cast<double>(step - options.warmup);
  const auto length = static_cast<double>(std::max<int64_t>(options.steps - options.warmup, 1));
  const double cosine =
      0.5 * (1 + std::cos(std::numbers::pi * std::min(after_warmup / length, 1.0)));
  return options.learning_rate * (kLastPart + (1 - kLastPart) * cosine);
}

void set_learning_rate(torch::optim::Optimizer& optimizer, double learning_rate) {
  for (auto& group : optimizer.param_groups()) {
    group.options().set_lr(learning_rate);
  }
}

}  // namespace train_lm
