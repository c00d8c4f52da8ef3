#pragma once

#include <anabranch/experts.h>
#include <anabranch/grouped_gemm.h>
#include <anabranch/options.h>
#include <torch/csrc/autograd/custom_function.h>

#include <functional>
#include <optional>
#include <tuple>
#include <vector>

#include "experts/permute.h"

namespace anabranch {

/// What an expert computes, besides its parameters.
struct FeedForward {
  std::shared_ptr<GroupedGemmEngine> engine;
  HiddenActivation activation;
};

inline Projection projection(const torch::Tensor& weight,
                             const std::optional<torch::Tensor>& bias) {
  return {weight, bias.value_or(torch::Tensor())};
}

/// As a list of tensors has them.
inline auto tensors_of(ExpertProjections& experts) {
  return std::tie(experts.up.weight, experts.up.bias, experts.down.weight, experts.down.bias);
}

/// Neighbours among rows.
struct RowRange {
  int64_t first = 0;
  int64_t count = 0;
};

/// How a feed-forward takes turns with an exchange, whose chunks of rows come before it and go on behind
/// it. All of the chunks are asked for, and gone on with, in their order.
template <typename Output>
struct Pipeline {
  std::vector<RowRange> chunks;  ///< of the rows [P]: of whole experts, or in one expert
  /// Waits for the rows of the next chunk, before they are read.
  std::function<void()> wait_for_next;
  /// The rows of the next chunk in the output are done.
  std::function<void(const Output&)> go_on;
  /// Backward: the weights' gradients come when a chunk has gone on, and so beside its way; until then what
  /// they are made of is kept. Otherwise they come as early as memory is freed by it.
  bool weights_last = false;
};

struct FeedForwardOutput {
  torch::Tensor results;  ///< [P, h]
  torch::Tensor hidden;   ///< [P, n or 2n], what the activation was given; undefined if not kept
};
/// down(activation(up(x))) of every expert on its own rows of `x` [P, h].
FeedForwardOutput feed_forward(const FeedForward& expert, const IndexedRows& x,
                               const ExpertProjections& parameters, const ExpertCounts& counts,
                               bool keep_hidden, const Pipeline<FeedForwardOutput>& pipeline = {});

/// Which parameters a backward is to find the gradients of.
struct WantedGradients {
  bool up_weight = true;
  bool up_bias = true;
  bool down_weight = true;
  bool down_bias = true;
  WeightSums sums = {};  ///< where defined, the weight's gradient is added to it and not returned
};

/// Those that autograd asks `context` for, whose tensor arguments from number `first` on are
/// up_weight and down_weight and, where there are biases, up_bias and down_bias.
inline WantedGradients wanted_gradients(const torch::autograd::AutogradContext* context,
                                        size_t first, const ExpertProjections& parameters) {
  const auto wanted = [&](const torch::Tensor& parameter, size_t i) {
    return parameter.defined() && context->needs_input_grad(first + i);
  };
  return {.up_weight = wanted(parameters.up.weight, 0),
          .up_bias = wanted(parameters.up.bias, 2),
          .down_weight = wanted(parameters.down.weight, 1),
          .down_bias = wanted(parameters.down.bias, 3)};
}

struct FeedForwardGradient {
  ExpertProjections parameters;    ///< undefined where not wanted
  torch::Tensor dx;                ///< [P, h]
  torch::Tensor drouting_weights;  ///< [P] in fp32 (fp64)
};
/// Backward of `routing_weights` [P] (undefined: 1) times the results, given the gradient `dy` [P, h] of that
/// product. Needs neither the activation nor the results; `hidden` undefined is computed again.
/// `overwrite_hidden`: its gradient may take its place, and hidden is lost.
FeedForwardGradient feed_forward_backward(const FeedForward& expert, const IndexedRows& dy,
                                          const IndexedRows& x, const torch::Tensor& hidden,
                                          const torch::Tensor& routing_weights,
                                          const ExpertProjections& parameters,
                                          const ExpertCounts& counts, bool overwrite_hidden = false,
                                          const WantedGradients& wanted = {},
                                          const Pipeline<FeedForwardGradient>& pipeline = {});

}  // namespace anabranch
