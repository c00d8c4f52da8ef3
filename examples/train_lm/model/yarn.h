#pragma once

#include <torch/types.h>

#include "model/model_options.h"

namespace train_lm {

/// Radians from one position to the next, [rotated_width / 2]: powers of rope_theta, and with YaRN
/// (arXiv:2309.00071) those of the numbers that turn slowly divided by its factor.
torch::Tensor frequencies_of(const ModelOptions& model, const at::TensorOptions& options);

/// What YaRN multiplies rotated queries and keys by; 1 without.
double rotation_scale(const ModelOptions& model);

/// What it multiplies latent attention's softmax by besides, as DeepSeek-V3 has it.
double latent_softmax_scale(const ModelOptions& model);

}  // namespace train_lm
