// A layer in 16 bits beside the same layer in plain LibTorch operations: both against the dense
// reference in fp64, on the same inputs.
#include <anabranch/moe_layer.h>
#include <gtest/gtest.h>

#include <cmath>

#include "support/devices.h"
#include "support/layer_case.h"
#include "support/tolerance.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

/// What both are measured by, by name.
using Results = std::map<std::string, torch::Tensor>;

/// The usual loop: index_select, products, index_add, and autograd; rounded after every operation.
Results run_plain(const LayerCase& layer_case) {
  NamedTensors leaves;
  for (const auto& [name, value] : layer_case.parameters) {
    leaves[name] = on_device(value).clone().requires_grad_();
  }
  const auto x = on_device(layer_case.x).clone().requires_grad_();
  const auto weights = on_device(layer_case.weights).clone().requires_grad_();
  const auto ids = on_device(layer_case.expert_ids);
  auto y = torch::zeros_like(x);
  for (int64_t e = 0; e < layer_case.options.num_experts; ++e) {
    const auto places = ids.eq(e).nonzero();
    const auto tokens = places.select(1, 0);
    const auto result =
        reference::expert(x.index_select(0, tokens), leaves.at("experts.up_weight")[e], {},
                          leaves.at("experts.down_weight")[e], {}, layer_case.options.activation,
                          layer_case.options.glu);
    const auto scale = weights.index({tokens, places.select(1, 1)}).unsqueeze(1);
    y = y.index_add(0, tokens, (result * scale).to(y.scalar_type()));
  }
  (y * on_device(layer_case.doutput)).sum(torch::kFloat32).backward();
  return {{"output", y},
          {"dx", x.grad()},
          {"dweights", weights.grad()},
          {"experts.up_weight", leaves.at("experts.up_weight").grad()},
          {"experts.down_weight", leaves.at("experts.down_weight").grad()}};
}

Results run_layer(const LayerCase& layer_case) {
  auto layer = make_layer(layer_case, make_self_communicator());
  const auto step = run_step(layer, layer_case, {layer_case.tokens}, 0);
  const auto parameters = layer->named_parameters();
  return {{"output", step.output.output},
          {"dx", step.x.grad()},
          {"dweights", step.weights.grad()},
          {"experts.up_weight", parameters["experts.up_weight"].grad()},
          {"experts.down_weight", parameters["experts.down_weight"].grad()}};
}

Results exact(const LayerCase& layer_case) {
  const auto expected = run_reference(layer_case, 1);
  return {{"output", expected.result.output},
          {"dx", expected.dx},
          {"dweights", expected.dweights},
          {"experts.up_weight", expected.gradients.at("experts.up_weight")},
          {"experts.down_weight", expected.gradients.at("experts.down_weight")}};
}

double root_mean_square(const torch::Tensor& tensor) {
  return std::sqrt(tensor.square().mean().item<double>());
}

class PrecisionTest : public ::testing::TestWithParam<torch::Dtype> {};
INSTANTIATE_TEST_SUITE_P(Types, PrecisionTest, ::testing::Values(torch::kBFloat16, torch::kFloat16),
                         [](const auto& info) { return to_string(info.param); });

TEST_P(PrecisionTest, ErrsNoMoreThanPlainOperations) {
  if (world()->size() > 1) {
    GTEST_SKIP() << "one rank suffices";
  }
  Random random(test_seed());
  for (const bool glu : {false, true}) {
    MoEOptions options;
    options.hidden_size = 128;
    options.expert_hidden_size = 192;
    options.num_experts = 8;
    options.top_k = 3;
    options.glu = glu;
    options.activation = glu ? Activation::kSilu : Activation::kGeluTanh;
    options.dtype = GetParam();
    const auto layer_case = draw_layer_case(random, 1, options, 512, Skew::kUniform, Split::kEven,
                                            /*routing_from_outside=*/true);
    const auto expected = exact(layer_case);
    const auto plain = run_plain(layer_case);
    for (const auto& [name, result] : run_layer(layer_case)) {
      const auto error = [&](const torch::Tensor& tensor) {
        return root_mean_square(tensor.detach().to(torch::kCPU, torch::kFloat64) -
                                expected.at(name));
      };
      // Two samples of the same errors would differ by so much: six deviations of a mean square.
      const double chance = 6 / std::sqrt(2.0 * static_cast<double>(result.numel()));
      EXPECT_LE(error(result), error(plain.at(name)) * (1 + chance))
          << name << (glu ? ", glu" : "");
    }
  }
}

}  // namespace
}  // namespace anabranch::test
