// Memory that is refused in the middle of a step: the step throws, and tried again it gives the bits that
// it would have given at once.
#include <anabranch/moe_layer.h>
#include <gtest/gtest.h>

#include <map>

#include "support/failing_allocator.h"
#include "support/random.h"
#include "support/tolerance.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

MoEOptions small_options(bool recompute) {
  MoEOptions options;
  options.hidden_size = 16;
  options.expert_hidden_size = 24;
  options.num_experts = 4;
  options.top_k = 2;
  options.glu = true;
  options.bias = true;
  options.shared_expert_hidden_size = 8;
  options.recompute = recompute;
  return options;
}

/// A layer and its input, whose steps all give the same.
struct Repeated {
  explicit Repeated(bool recompute) : layer(small_options(recompute)) {
    Random random(test_seed());
    x = random.normal({40, 16}, torch::kFloat32).requires_grad_();
  }

  torch::Tensor forward() { return layer->forward(x).output.square().sum(); }

  void forget_gradients() {
    layer->zero_grad();
    x.mutable_grad() = torch::Tensor();
  }

  std::map<std::string, torch::Tensor> gradients() {
    std::map<std::string, torch::Tensor> found{{"x", x.grad().clone()}};
    for (const auto& parameter : layer->named_parameters()) {
      found.emplace(parameter.key(), parameter.value().grad().clone());
    }
    return found;
  }

  MoELayer layer;
  torch::Tensor x;
};

class OutOfMemory : public ::testing::TestWithParam<bool> {
 protected:
  /// `attempt` with each of its allocations refused in turn, and then a whole step.
  template <typename Attempt>
  void expect_recovery(Repeated& repeated, const Attempt& attempt) {
    repeated.forward().backward();
    const auto expected = repeated.gradients();
    FailingAllocator memory;
    int64_t refused = 0;
    for (bool failed = true; failed; ++refused) {
      repeated.forget_gradients();
      failed = attempt(memory, refused);
      repeated.forget_gradients();
      repeated.forward().backward();
      for (const auto& [name, gradient] : repeated.gradients()) {
        ASSERT_TRUE(identical(gradient, expected.at(name))) << name << " after " << refused;
      }
    }
    EXPECT_GT(refused, 10);
  }

  /// Runs `step` with the allocation behind `successes` others refused: whether there was one, and then
  /// an exception came of it.
  template <typename Step>
  static bool fails(FailingAllocator& memory, int64_t successes, const Step& step) {
    bool thrown = false;
    memory.fail_after(successes);
    try {
      step();
    } catch (const std::exception&) {
      thrown = true;
    }
    const bool refused = memory.stop();
    EXPECT_EQ(thrown, refused) << "allocation " << successes;
    return refused;
  }
};

TEST_P(OutOfMemory, InForward) {
  Repeated repeated(GetParam());
  expect_recovery(repeated, [&](FailingAllocator& memory, int64_t successes) {
    return fails(memory, successes, [&] { repeated.forward(); });
  });
}

TEST_P(OutOfMemory, InBackward) {
  Repeated repeated(GetParam());
  expect_recovery(repeated, [&](FailingAllocator& memory, int64_t successes) {
    const torch::Tensor loss = repeated.forward();
    return fails(memory, successes, [&] { loss.backward(); });
  });
}

INSTANTIATE_TEST_SUITE_P(Recompute, OutOfMemory, ::testing::Bool());

}  // namespace
}  // namespace anabranch::test
