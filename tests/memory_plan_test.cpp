// What plan_memory foresees, against what LibTorch's allocator hands out in a step.
#include <anabranch/memory_plan.h>
#include <anabranch/moe_layer.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "support/devices.h"
#include "support/memory_meter.h"
#include "support/random.h"
#include "support/thrown.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

struct Measured {
  int64_t parameters = 0;
  int64_t saved = 0;
  int64_t forward = 0;
  int64_t backward = 0;
  int64_t scratch = 0;  ///< of one product, within forward and backward
  double load = 0;      ///< of this rank
};

MoEOptions options_of(torch::Dtype dtype) {
  MoEOptions options;
  options.hidden_size = 192;
  options.expert_hidden_size = 256;
  options.num_experts = 12;  // as many on each of 1 to 4 ranks
  options.top_k = 2;
  options.glu = true;
  options.activation = Activation::kSilu;
  options.engine = "deterministic";  // measures nothing in its first step
  options.dtype = dtype;
  options.device = device();
  return options;
}

/// Tokens [T, h], fp32, that choose every expert as often as the others, each token its own at random: of E tokens
/// one after another the t-th is the sum of the router's vectors of experts t + d mod E, for top_k offsets d. Of
/// random tokens a part's experts would now and then have a fifth more rows than the plan can know of.
torch::Tensor evenly_choosing(Random& random, const torch::Tensor& router, int64_t tokens,
                              int64_t top_k) {
  const int64_t num_experts = router.size(0);
  const auto directions = router / router.norm(2, 1, true);
  std::vector<torch::Tensor> blocks;
  for (int64_t first = 0; first < tokens; first += num_experts) {
    const auto t = torch::arange(first, std::min(first + num_experts, tokens));
    const auto offsets = random.permutation(num_experts).narrow(0, 0, top_k);
    const auto ids = (t.unsqueeze(1) + offsets).remainder(num_experts);  // [<= E, top_k]
    blocks.push_back(directions.index_select(0, ids.flatten()).view({t.size(0), top_k, -1}).sum(1));
  }
  return torch::cat(blocks);
}

/// What the most wasteful of an expert's products takes beside its result: on a CPU that cannot multiply bf16, the
/// library of products makes copies in fp32. The plan knows what a GPU's take.
int64_t scratch_of_a_product(const MoEOptions& options, int64_t rows) {
  if (!options.device.is_cpu()) {
    return 0;
  }
  const auto made = [&](int64_t height, int64_t width) {
    return torch::zeros({height, width}, torch::dtype(options.dtype));
  };
  MemoryMeter meter(options.device);
  int64_t most = 0;
  const auto take = [&](const torch::Tensor& left, const torch::Tensor& right) {
    auto product = made(left.size(0), right.size(1));
    const int64_t before = meter.alive();
    meter.take_most();
    torch::mm_out(product, left, right);
    most = std::max(most, meter.take_most() - before);
  };
  const int64_t width = options.expert_hidden_size * (options.glu ? 2 : 1);
  const auto x = made(rows, options.hidden_size);
  const auto dy = made(rows, width);
  const auto weight = made(width, options.hidden_size);
  take(x, weight.t());
  take(dy, weight);
  take(dy.t(), x);
  return most;
}

/// Of the second step of a layer: in the first, kernels and libraries find what they keep.
Measured measure(const MoEOptions& options, int64_t tokens, Random& random) {
  Measured found;
  MemoryMeter meter(options.device);
  MoELayer layer(options, world());
  found.parameters = meter.alive();
  const auto router = layer->named_parameters()["router.weight"].detach().cpu().to(torch::kFloat32);
  const auto to_device = [&](const torch::Tensor& values) {
    return values.to(options.device, options.dtype);
  };
  const auto x = to_device(evenly_choosing(random, router, tokens, options.top_k)).requires_grad_();
  const auto dy = to_device(random.normal({tokens, options.hidden_size}, torch::kFloat32));
  layer->forward(x).output.backward(dy);
  layer->zero_grad();
  x.mutable_grad() = torch::Tensor();
  meter.take_most();
  const int64_t before = meter.alive();
  auto out = layer->forward(x);
  found.saved = meter.alive() - before;
  found.forward = meter.take_most() - before;
  out.output.backward(dy);
  found.backward = meter.take_most() - before;
  const auto& placement = layer->exchange().placement();
  const int rank = world()->rank();
  int64_t received = 0;
  for (int64_t local = 0; local < placement.local_experts(rank); ++local) {
    received += out.expert_load[placement.at(rank, local).expert].item<int64_t>();
  }
  found.load = static_cast<double>(received) /
               static_cast<double>(tokens * options.top_k * placement.at(rank, 0).slices);
  const int64_t rows_of_an_expert = tokens * world()->size() * options.top_k / options.num_experts;
  found.scratch = scratch_of_a_product(options, rows_of_an_expert);
  return found;
}

class MemoryPlanTest : public ::testing::Test {
 protected:
  void expect_foreseen(const MoEOptions& options, int64_t tokens) {
    const Measured measured = measure(options, tokens, random_);
    const auto plan = plan_memory(options, tokens, world()->size(), measured.load);
    SCOPED_TRACE(plan.explain());
    const auto expect_near = [](const char* what, const std::vector<MemoryPlan::Item>& items,
                                int64_t bytes, int64_t scratch = 0) {
      const auto foreseen = static_cast<double>(total_bytes(items));
      const auto tenth = 0.1 * static_cast<double>(bytes);
      const auto ratio = foreseen / static_cast<double>(bytes);
      EXPECT_LE(foreseen, static_cast<double>(bytes) + tenth) << what << ": " << ratio;
      EXPECT_GE(foreseen, static_cast<double>(bytes - scratch) - tenth)
          << what << ": " << ratio << " of what it was, " << scratch << " bytes of it for products";
    };
    expect_near("parameters", plan.parameters, measured.parameters);
    expect_near("saved", plan.saved, measured.saved);
    expect_near("forward", plan.forward, measured.forward, measured.scratch);
    expect_near("backward", plan.backward, measured.backward, measured.scratch);
  }

  Random random_{test_seed()};
};

TEST_F(MemoryPlanTest, WithinATenthOfWhatIsAllocated) {
  for (const auto dtype : {torch::kFloat32, torch::kBFloat16}) {
    SCOPED_TRACE(dtype);
    auto options = options_of(dtype);
    expect_foreseen(options, 1500);
    options.recompute = true;
    expect_foreseen(options, 1500);
  }
}

TEST_F(MemoryPlanTest, OfOtherLayers) {
  auto wide = options_of(torch::kFloat32);
  wide.num_experts = 24;
  wide.top_k = 4;
  wide.glu = false;
  wide.bias = true;
  wide.expert_hidden_size = 96;
  expect_foreseen(wide, 1000);
  auto shared = options_of(torch::kFloat32);
  shared.shared_expert_hidden_size = 320;
  expect_foreseen(shared, 1200);
  shared.shared_expert_gate = true;
  expect_foreseen(shared, 1200);
}

TEST_F(MemoryPlanTest, OfPlacedExperts) {
  auto options = options_of(torch::kFloat32);
  options.placement = "movable";
  expect_foreseen(options, 1000);
  options.num_experts = 1;
  options.top_k = 1;
  options.renormalize = false;
  options.placement = "sliced";  // of 3 ranks each has a third
  expect_foreseen(options, 1000);
}

TEST_F(MemoryPlanTest, OfTheRankThatHoldsMost) {
  auto options = options_of(torch::kFloat32);
  options.num_experts = 2;
  options.placement = "sliced";  // halves of one expert, and all of the other
  const auto bytes = [&](int64_t ranks) {
    return total_bytes(plan_memory(options, 0, ranks).parameters);
  };
  EXPECT_EQ(bytes(3), bytes(2));
  EXPECT_LT(bytes(4), bytes(3));
  options.placement = "0,1;";
  EXPECT_GT(bytes(2), total_bytes(plan_memory(options_of(torch::kFloat32), 0, 12).parameters));
}

TEST_F(MemoryPlanTest, OfARoomForAnyRouting) {
  if (!world()->reads_counts_on(device())) {
    GTEST_SKIP() << world()->name() << " does not read counts on " << device();
  }
  auto options = options_of(torch::kFloat32);
  options.receive_capacity = world()->size();
  expect_foreseen(options, 800);
}

// Nearly all is parameters and their gradients then.
TEST_F(MemoryPlanTest, OfHardlyAnyTokens) {
  const auto options = options_of(torch::kFloat32);
  const Measured measured = measure(options, 4, random_);
  const auto most =
      static_cast<double>(measured.parameters + std::max(measured.forward, measured.backward));
  const auto plan = plan_memory(options, 4, world()->size(), measured.load);
  const auto foreseen = static_cast<double>(plan.peak() - total_bytes(plan.mailboxes));
  EXPECT_NEAR(foreseen, most, 0.1 * most) << plan.explain();
}

TEST_F(MemoryPlanTest, GrowsWithTheLoadAndNoFurtherThanAnyRoutingGoes) {
  const auto options = options_of(torch::kBFloat16);
  const auto peak = [&](double load) { return plan_memory(options, 1000, 4, load).peak(); };
  EXPECT_LT(peak(1), peak(2));
  EXPECT_LT(peak(2), peak(4));
  EXPECT_EQ(peak(4), peak(100));  // 4 ranks' tokens, all for the experts of one
  EXPECT_LT(plan_memory(options, 0, 4, 0).peak(), peak(0.1));
}

TEST_F(MemoryPlanTest, Explains) {
  const auto plan = plan_memory(options_of(torch::kBFloat16), 1 << 20, 8);
  const auto text = plan.explain();
  for (const char* word : {"parameters", "experts", "hidden", "rows received", "at most", "MiB"}) {
    EXPECT_NE(text.find(word), std::string::npos) << word << " in\n" << text;
  }
  EXPECT_EQ(total_bytes(plan.mailboxes) > 0, device().is_cuda());
}

TEST_F(MemoryPlanTest, RefusesWhatNoLayerHas) {
  const auto options = options_of(torch::kFloat32);
  EXPECT_INPUT_ERROR(plan_memory(options, -1), "-1");
  EXPECT_INPUT_ERROR(plan_memory(options, 1, 0), "ranks = 0");
  EXPECT_INPUT_ERROR(plan_memory(options, 1, 1, -0.5), "-0.5");
  EXPECT_INPUT_ERROR(plan_memory(MoEOptions{}, 1), "hidden_size");
}

}  // namespace
}  // namespace anabranch::test
