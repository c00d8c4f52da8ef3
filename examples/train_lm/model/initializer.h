#pragma once

#include <torch/types.h>

#include "model/model_options.h"
#include "data/random.h"

namespace train_lm {

/// Draws parameters one after another, each from its own generator.
class Initializer {
 public:
  Initializer(uint64_t seed, torch::TensorOptions options) : seed_(seed), options_(options) {}

  /// Normal with this standard deviation; drawn in fp32 whatever the parameters' type.
  torch::Tensor normal(at::IntArrayRef sizes, double deviation);
  torch::Tensor ones(at::IntArrayRef sizes) const;
  torch::Tensor zeros(at::IntArrayRef sizes) const;

 private:
  uint64_t seed_;
  uint64_t drawn_ = 0;
  torch::TensorOptions options_;
};

/// Standard deviation of what adds to the residual stream, so that its size does not grow with the number
/// of layers.
double output_deviation(int64_t fan_in, const ModelOptions& model);

}  // namespace train_lm
