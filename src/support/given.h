#pragma once

#include <torch/types.h>

#include <optional>

namespace anabranch {

/// A tensor as an autograd function takes it: no argument at all where there is none.
inline std::optional<torch::Tensor> given(const torch::Tensor& tensor) {
  return tensor.defined() ? std::optional(tensor) : std::nullopt;
}

}  // namespace anabranch
