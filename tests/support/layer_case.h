#pragma once

#include <anabranch/moe_layer.h>

#include <map>
#include <string>
#include <vector>

#include "reference/dense_moe.h"
#include "support/random_routing.h"

namespace anabranch::test {

/// Tensors by the names of a layer's parameters ("experts.up_weight"), experts over all ranks.
using NamedTensors = std::map<std::string, torch::Tensor>;

/// A layer, its parameters and a global batch, drawn once and the same on every rank.
struct LayerCase {
  MoEOptions options;
  int64_t tokens = 0;
  Skew skew = Skew::kUniform;
  Split split = Split::kEven;
  bool routing_from_outside = false;

  std::vector<int64_t> counts;  ///< [W] tokens of each rank
  NamedTensors parameters;      ///< in the layer's types
  torch::Tensor expert_bias;    ///< [E], undefined without the option
  torch::Tensor x;              ///< [tokens, h]
  torch::Tensor doutput;        ///< [tokens, h] gradient of the output
  torch::Tensor expert_ids;     ///< [tokens, top_k], of routing from outside
  torch::Tensor weights;        ///< [tokens, top_k]
  /// Coefficients of the auxiliary losses in every rank's loss.
  double balance_coefficient = 0.3;
  double z_coefficient = 0.2;

  std::string describe() const;
};

/// Draws everything for the given options, on the CPU, for a layer on the test's device. Inputs are
/// redrawn until rounding cannot change which experts a token goes to, nor the side of ReLU's corner.
LayerCase draw_layer_case(Random& random, int ranks, const MoEOptions& options, int64_t tokens,
                          Skew skew, Split split, bool routing_from_outside);

/// Corners that a random draw may miss, then `sample` random ones.
std::vector<LayerCase> layer_cases(Random& random, int ranks, int64_t sample);

/// Copies parameters into the layer: of the experts, those of its rank.
void set_parameters(MoELayer& layer, const NamedTensors& parameters);
/// The layer on `communicator` with the case's parameters.
MoELayer make_layer(const LayerCase& layer_case, std::shared_ptr<Communicator> communicator);

/// One step's results on this rank; gradients as backward leaves them.
struct Step {
  MoEOutput output;
  torch::Tensor x;        ///< leaf, with its gradient
  torch::Tensor weights;  ///< leaf, where routing comes from outside
};
/// This rank's loss: ⟨output, doutput⟩ + the weighted auxiliary losses.
torch::Tensor loss_of(const LayerCase& layer_case, const MoEOutput& output,
                      const torch::Tensor& doutput);
/// Forward and backward of the rows that `counts` gives this rank.
Step run_step(MoELayer& layer, const LayerCase& layer_case, const std::vector<int64_t>& counts,
              int rank);

/// Gradients by parameter name for all experts, summed over the ranks for replicated parameters; a
/// gradient nobody has is zero.
NamedTensors gather_gradients(MoELayer& layer, Communicator& communicator);

/// Root of the sum of squares of the terms that a result is made of, at its largest element: what
/// rounding errors are in proportion to. Of the way through the experts alone, without the gate.
struct Scale {
  double output = 0, dx = 0, dweights = 0;
  std::map<std::string, double> gradients;
};

/// Outputs and gradients of the sum of all ranks' losses, by the dense reference in fp64.
struct Expected {
  reference::DenseMoE::Result result;
  torch::Tensor dx;
  torch::Tensor dweights;  ///< of the routing weights, wherever they come from
  NamedTensors gradients;
  Scale scale;
};
Expected run_reference(const LayerCase& layer_case, int ranks);
reference::DenseMoE make_reference(const NamedTensors& parameters, const MoEOptions& options,
                                   const torch::Tensor& expert_bias = {});

}  // namespace anabranch::test
