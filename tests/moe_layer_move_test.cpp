// A layer that is moved to another type or device, alone or as a part of a model.
#include <anabranch/moe_layer.h>
#include <gtest/gtest.h>

#include "support/devices.h"
#include "support/layer_case.h"
#include "support/thrown.h"
#include "support/tolerance.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

struct ModelImpl : torch::nn::Module {
  explicit ModelImpl(const MoEOptions& options)
      : layer(register_module("layer", MoELayer(options, world()))) {}
  MoELayer layer;
};
TORCH_MODULE(Model);

class MovedLayerTest : public ::testing::Test {
 protected:
  static MoEOptions options_of(torch::Dtype dtype, torch::Device where) {
    MoEOptions options;
    options.hidden_size = 8;
    options.expert_hidden_size = 12;
    options.num_experts = 5;
    options.bias = options.expert_bias = true;
    options.shared_expert_hidden_size = 6;
    options.shared_expert_gate = true;
    options.dtype = dtype;
    options.device = where;
    return options;
  }

  /// `moved` computes what a layer made with `options` from its parameters does, forward and backward.
  void expect_as_made(MoELayer& moved, const MoEOptions& options) {
    MoELayer made(options, world());
    {
      const torch::NoGradGuard no_grad;
      const auto parameters = moved->named_parameters();
      for (auto& parameter : made->named_parameters()) {
        const auto& value = parameters[parameter.key()];
        EXPECT_EQ(value.scalar_type(), parameter.value().scalar_type()) << parameter.key();
        EXPECT_EQ(value.device(), parameter.value().device()) << parameter.key();
        parameter.value().copy_(value);
      }
    }
    const auto x = random_.normal({9, 8}).to(options.device, options.dtype);
    const auto step = [&](MoELayer& layer) {
      layer->zero_grad();
      const auto leaf = x.clone().requires_grad_();
      const auto output = layer->forward(leaf);
      (output.output.sum() + output.balance_loss).backward();
      return std::make_pair(output.output.detach(), leaf.grad());
    };
    const auto [y, dx] = step(moved);
    const auto [expected_y, expected_dx] = step(made);
    EXPECT_TRUE(identical(y, expected_y));
    EXPECT_TRUE(identical(dx, expected_dx));
  }

  Random random_{test_seed()};
};

TEST_F(MovedLayerTest, TakesRowsOfItsNewType) {
  for (const auto from : all_dtypes()) {
    for (const auto to : all_dtypes()) {
      SCOPED_TRACE(c10::str(to_string(from), " to ", to_string(to)));
      Model model(options_of(from, device()));
      model->to(to);
      EXPECT_EQ(model->layer->options().dtype, to);
      expect_as_made(model->layer, options_of(to, device()));
    }
  }
}

TEST_F(MovedLayerTest, GoesToAnotherDeviceAndBack) {
  if (!have_cuda() || device().is_cpu()) {
    GTEST_SKIP() << "needs --device cuda";
  }
  Model model(options_of(torch::kFloat32, torch::kCPU));
  model->to(device());
  expect_as_made(model->layer, options_of(torch::kFloat32, device()));
  model->to(torch::kCPU, torch::kFloat64);
  expect_as_made(model->layer, options_of(torch::kFloat64, torch::kCPU));
}

TEST_F(MovedLayerTest, MainGradientsMoveAlong) {
  MoELayer layer(options_of(torch::kBFloat16, device()), world());
  auto experts = layer->experts();
  experts->main_grad.up = torch::ones_like(experts->up_weight, torch::kFloat32);
  layer->to(torch::kFloat64);
  EXPECT_EQ(experts->main_grad.up.scalar_type(), torch::kFloat64);
  layer->forward(random_.normal({9, 8}).to(device(), torch::kFloat64)).output.sum().backward();
  EXPECT_FALSE(experts->up_weight.grad().defined());
}

TEST_F(MovedLayerTest, WhatNoLayerCanBeIsRefusedAndChangesNothing) {
  MoELayer layer(options_of(torch::kFloat32, device()), world());
  EXPECT_INPUT_ERROR(layer->to(torch::kInt32), "dtype");
  EXPECT_INPUT_ERROR(layer->to(torch::Device(torch::kMeta)), "meta");
  expect_as_made(layer, options_of(torch::kFloat32, device()));
}

}  // namespace
}  // namespace anabranch::test
