#pragma once

#include <torch/nn/module.h>
#include <torch/optim/adamw.h>

#include <memory>

#include "options.h"

namespace train_lm {

/// AdamW over all parameters of this rank; weight decay on matrices only.
std::unique_ptr<torch::optim::AdamW> make_optimizer(const torch::nn::Module& model,
                                                    const TrainingOptions& options);

/// Linear warm-up to the peak, then a cosine to a tenth of it. `step` counts from 1.
double learning_rate_at(int64_t step, const TrainingOptions& options);

void set_learning_rate(torch::optim::Optimizer& optimizer, double learning_rate);

}  // namespace train_lm
