#include "model/feed_forward.h"

#include <ATen/ATen.h>

#include <cmath>

namespace train_lm {

FeedForwardImpl::FeedForwardImpl(const ModelOptions& options, Initializer& initializer)
    : glu_(options.glu) {
  const int64_t hidden = options.hidden, inner = options.dense_hidden;
  const double deviation = 1 / std::sqrt(static_cast<double>(hidden));
  up_weight_ =
      register_parameter("up", initializer.normal({glu_ ? 2 * inner : inner, hidden}, deviation));
  down_weight_ = register_parameter(
      "down", initializer.normal({hidden, inner}, output_deviation(inner, options)));
}

torch::Tensor FeedForwardImpl::forward(const torch::Tensor& x) {
  const auto up = at::linear(x, up_weight_);
  if (!glu_) {
    return at::linear(at::gelu(up, "tanh"), down_weight_);
  }
  const auto parts = up.chunk(2, -1);
  return at::linear(at::silu(parts[0]) * parts[1], down_weight_);
}

}  // namespace train_lm
