#pragma once

#include <anabranch/grouped_gemm.h>
#include <anabranch/options.h>

#include <optional>

#include "experts/permute.h"

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

/// The parameters of the local experts, or their gradients.
struct ExpertProjections {
  Projection up;    ///< out: n, or 2n (gate, then up) for a GLU
  Projection down;  ///< in: n
};

/// Rows of each local expert, expert-major.
using ExpertCounts = std::vector<int64_t>;

struct FeedForwardOutput {
  torch::Tensor results;  ///< [P, h]
  torch::Tensor hidden;   ///< [P, n or 2n], what the activation was given; undefined if not kept
};
/// down(activation(up(x))) of every expert on its own rows of `x` [P, h].
FeedForwardOutput feed_forward(const FeedForward& expert, const IndexedRows& x,
                               const ExpertProjections& parameters, const ExpertCounts& counts,
                               bool keep_hidden);

struct FeedForwardGradient {
  ExpertProjections parameters;
  torch::Tensor dx;       ///< [P, h]
  torch::Tensor dvalues;  ///< [P] in fp32 (fp64), of the routing weights
};
/// Backward of `values` [P] (undefined: 1) times the results, given the gradient `dy` [P, h] of that
/// product. Needs neither the activation nor the results; `hidden` undefined is computed again.
/// `overwrite_hidden`: its gradient may take its place, and hidden is lost.
FeedForwardGradient feed_forward_backward(const FeedForward& expert, const IndexedRows& dy,
                                          const IndexedRows& x, const torch::Tensor& hidden,
                                          const torch::Tensor& values,
                                          const ExpertProjections& parameters,
                                          const ExpertCounts& counts,
                                          bool overwrite_hidden = false);

}  // namespace anabranch
