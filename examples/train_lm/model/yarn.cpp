#include "model/yarn.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <numbers>

namespace train_lm {
namespace {

/// `strength` times what the paper found for attention over `factor` times as many positions.
double scale_of(double factor, double strength) {
  return factor > 1 ? 1 + 0.1 * strength * std::log(factor) : 1;
}

/// Which number of a head makes so many turns over the positions that the model was trained on.
double number_that_turns(double turns, const ModelOptions& model) {
  const double radians = 2 * std::numbers::pi * turns;
  return static_cast<double>(model.rotated_width()) *
         std::log(static_cast<double>(model.yarn_positions) / radians) /
         (2 * std::log(model.rope_theta));
}

/// [rotated_width / 2] from 0, of numbers that stay as they are, to 1, of those that are stretched.
torch::Tensor stretched_part(const ModelOptions& model, const at::TensorOptions& options) {
  double first = number_that_turns(model.yarn_beta_fast, model);
  double last = number_that_turns(model.yarn_beta_slow, model);
  if (model.yarn_bounds == "whole") {
    first = std::floor(first);
    last = std::ceil(last);
  }
  first = std::max(first, 0.0);
  last = std::min(last, static_cast<double>(model.rotated_width() - 1));
  const double width = last == first ? 0.001 : last - first;
  return ((at::arange(model.rotated_width() / 2, options) - first) / width).clamp(0, 1);
}

}  // namespace

torch::Tensor frequencies_of(const ModelOptions& model, const at::TensorOptions& options) {
  const int64_t width = model.rotated_width();
  const auto plain = at::pow(model.rope_theta,
                             at::arange(width / 2, options) * (-2.0 / static_cast<double>(width)));
  if (model.yarn_factor == 1) return plain;
  return at::lerp(plain, plain / model.yarn_factor, stretched_part(model, options));
}

double rotation_scale(const ModelOptions& model) {
  if (model.yarn_factor == 1) return 1;
  if (model.yarn_scale > 0) return model.yarn_scale;
  if (model.yarn_mscale > 0 && model.yarn_mscale_all > 0) {
    return scale_of(model.yarn_factor, model.yarn_mscale) /
           scale_of(model.yarn_factor, model.yarn_mscale_all);
  }
  return scale_of(model.yarn_factor, 1);
}

double latent_softmax_scale(const ModelOptions& model) {
  if (model.yarn_factor == 1 || model.yarn_mscale_all == 0) return 1;
  return std::pow(scale_of(model.yarn_factor, model.yarn_mscale_all), 2);
}

}  // namespace train_lm
