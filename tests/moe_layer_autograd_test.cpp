// What a program may do to a layer's graph, and what it is told when it may not.
#include <anabranch/moe_layer.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include "support/devices.h"
#include "support/random.h"
#include "support/thrown.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

class LayerGraphTest : public ::testing::Test {
 protected:
  LayerGraphTest() {
    MoEOptions options;
    options.hidden_size = 8;
    options.expert_hidden_size = 12;
    options.num_experts = 5;
    options.bias = true;
    options.shared_expert_hidden_size = 6;
    options.device = device();
    layer_ = MoELayer(options, world());
  }
  torch::Tensor rows() { return on_device(random_.normal({7, 8}, torch::kFloat32)); }

  static void expect_noticed(const torch::Tensor& loss, torch::Tensor changed) {
    {
      const torch::NoGradGuard no_grad;
      changed.add_(1);
    }
    const auto thrown = thrown_by([&] { loss.backward(); });
    EXPECT_TRUE(thrown.says("modified by an inplace operation")) << thrown;
  }

  MoELayer layer_{nullptr};
  Random random_{test_seed()};
};

// Whoever requires no gradient is saved all the same: for those of others.
TEST_F(LayerGraphTest, ChangesInPlaceAreNoticed) {
  const auto x = rows();
  expect_noticed(layer_->forward(x).output.sum(), x);
  for (const auto* name : {"experts.up_weight", "experts.down_weight", "shared_expert.up_weight",
                           "shared_expert.down_weight", "router.weight"}) {
    SCOPED_TRACE(name);
    auto parameter = layer_->named_parameters()[name];
    parameter.requires_grad_(false);
    expect_noticed(layer_->forward(rows().requires_grad_()).output.sum(), parameter);
    parameter.requires_grad_(true);
  }
}

TEST_F(LayerGraphTest, DoubleBackwardIsRefused) {
  const auto x = rows().requires_grad_();
  const auto output = layer_->forward(x);
  for (const auto& loss : {output.output.sum(), output.balance_loss, output.z_loss}) {
    const auto thrown = thrown_by([&] {
      torch::autograd::grad({loss}, {x}, {}, /*retain_graph=*/true, /*create_graph=*/true);
    });
    EXPECT_TRUE(thrown.says("differentiated again")) << thrown;
  }
  torch::autograd::grad({output.output.sum()}, {x});
}

}  // namespace
}  // namespace anabranch::test
