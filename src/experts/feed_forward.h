#pragma once

#include <anabranch/grouped_gemm.h>
#include <anabranch/options.h>

#include <optional>

namespace anabranch {

/// What an expert computes, besides its parameters.
struct FeedForward {
  std::shared_ptr<GroupedGemmEngine> engine;
  Activation activation = Activation::kGeluTanh;
  bool glu = false;
};

/// A projection of every local expert, [experts, out, in] and [experts, out]; the bias may be
/// undefined. Also holds their gradients.
struct Projection {
  torch::Tensor weight;
  torch::Tensor bias;
};

/// A bias as an autograd function takes it: no argument at all where there is none.
inline std::optional<torch::Tensor> given(const torch::Tensor& bias) {
  return bias.defined() ? std::optional(bias) : std::nullopt;
}
inline Projection projection(const torch::Tensor& weight,
                             const std::optional<torch::Tensor>& bias) {
  return {weight, bias.value_or(torch::Tensor())};
}

/// Rows of each local expert, expert-major.
using ExpertCounts = std::vector<int64_t>;

/// [P, in] → [P, out].
torch::Tensor project(const FeedForward& feed_forward, const torch::Tensor& rows,
                      const Projection& projection, const ExpertCounts& counts);
/// hidden [P, n or 2n] → [P, n].
torch::Tensor activate(const FeedForward& feed_forward, const torch::Tensor& hidden);

struct DownGradient {
  Projection parameters;
  torch::Tensor dhidden;  ///< [P, n or 2n], scaled by the routing weights
  torch::Tensor dvalues;  ///< [P], of the routing weights
};
/// Backward of down(activate(hidden)) scaled by `values` [P] (undefined: 1), given the gradient
/// `dy` [P, h] of the scaled result. Needs neither the activation nor the result itself.
DownGradient down_backward(const FeedForward& feed_forward, const torch::Tensor& dy,
                           const torch::Tensor& hidden, const torch::Tensor& values,
                           const Projection& down, const ExpertCounts& counts);

struct UpGradient {
  Projection parameters;
  torch::Tensor dx;  ///< [P, h]
};
/// Backward of the up-projection of `x` [P, h].
UpGradient up_backward(const FeedForward& feed_forward, const torch::Tensor& dhidden,
                       const torch::Tensor& x, const Projection& up, const ExpertCounts& counts);

}  // namespace anabranch
