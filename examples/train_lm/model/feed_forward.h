#pragma once

#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include "model/initializer.h"
#include "model/model_options.h"

namespace train_lm {

/// What a layer without experts has in their place: of their kind, for every token.
class FeedForwardImpl : public torch::nn::Module {
 public:
  FeedForwardImpl(const ModelOptions& options, Initializer& initializer);

  /// [.., h] → [.., h].
  torch::Tensor forward(const torch::Tensor& x);

 private:
  bool glu_;
  torch::Tensor up_weight_;    // [n or 2n, h]: the gate, then the up part
  torch::Tensor down_weight_;  // [h, n]
};
TORCH_MODULE(FeedForward);

}  // namespace train_lm
