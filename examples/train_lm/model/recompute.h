#pragma once

#include <torch/types.h>

#include <functional>
#include <vector>

namespace train_lm {

/// What `body(x)` returns, of which nothing is kept for backward but `x`: there `body` runs once more. So it
/// must compute the same both times. Of its outputs those of floating types have gradients.
std::vector<torch::Tensor> recomputed(
    const torch::Tensor& x,
    const std::function<std::vector<torch::Tensor>(const torch::Tensor&)>& body);

}  // namespace train_lm
