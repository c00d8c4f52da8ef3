#include "model/initializer.h"

#include <ATen/ATen.h>

#include <cmath>

namespace train_lm {

torch::Tensor Initializer::normal(at::IntArrayRef sizes, double deviation) {
  const auto generator = make_generator(seed_, Stream::kParameter, drawn_++);
  return (at::randn(sizes, generator, at::kFloat) * deviation).to(options_);
}

torch::Tensor Initializer::ones(at::IntArrayRef sizes) const { return at::ones(sizes, options_); }

torch::Tensor Initializer::zeros(at::IntArrayRef sizes) const { return at::zeros(sizes, options_); }

double output_deviation(int64_t fan_in, const ModelOptions& model) {
  return 1 / std::sqrt(static_cast<double>(fan_in)) /
         std::sqrt(2.0 * static_cast<double>(model.layers));
}

}  // namespace train_lm
