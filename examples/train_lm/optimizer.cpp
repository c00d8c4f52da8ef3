#include "optimizer.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace train_lm {
namespace {

constexpr double kBeta1 = 0.9;
constexpr double kBeta2 = 0.95;
constexpr double kLastPart = 0.1;  // of the peak learning rate

/// Matrices of hidden layers: not the embedding, the head, the routers.
bool is_hidden_matrix(const anabranch::ParallelParameter& parameter) {
  const auto& name = parameter.name;
  return parameter.tensor.dim() >= 2 && name != "embedding" && name != "head" &&
         name.find("router") == std::string::npos && !name.ends_with("bias") &&
         !name.ends_with("_gate");
}

/// A GLU's gate and up part lie one below the other.
int64_t parts_of(const anabranch::ParallelParameter& parameter, const ModelOptions& model) {
  const auto& name = parameter.name;
  return model.glu && (name.ends_with("up_weight") || name.ends_with("feed_forward.up")) ? 2 : 1;
}

std::unique_ptr<anabranch::ParallelOptimizer> make_whole_optimizer(
    const std::vector<anabranch::ParallelParameter>& parameters, const Options& options) {
  const TrainingOptions& training = options.training;
  const anabranch::AdamWOptions adamw{
      .beta1 = kBeta1,
      .beta2 = kBeta2,
      .weight_decay = training.weight_decay,
      .state = training.optimizer_state == "bfloat16" ? at::kBFloat16 : at::kFloat,
      .seed = training.seed};
  if (training.optimizer == "adamw") {
    return anabranch::make_adamw(parameters, adamw);
  }
  std::vector<anabranch::MuonParameter> matrices;
  std::vector<anabranch::ParallelParameter> others;
  for (const auto& parameter : parameters) {
    if (is_hidden_matrix(parameter)) {
      matrices.push_back({parameter, parts_of(parameter, options.model)});
    } else {
      others.push_back(parameter);
    }
  }
  return anabranch::make_muon(matrices, others,
                              {.weight_decay = training.weight_decay, .adamw = adamw});
}

}  // namespace

std::unique_ptr<anabranch::ParallelOptimizer> make_optimizer(
    const std::vector<anabranch::ParallelParameter>& parameters,
    const anabranch::ParallelGroups& groups, const Options& options) {
  const auto make = [&options](const std::vector<anabranch::ParallelParameter>& some) {
    return make_whole_optimizer(some, options);
  };
  return options.shard_optimizer ? anabranch::make_sharded_optimizer(parameters, groups, make)
                                 : make(parameters);
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

}  // namespace train_lm
