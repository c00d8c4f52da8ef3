// A step of a layer recorded into a CUDA graph once, and replayed with whatever routing comes.
#include <ATen/cuda/CUDAGraph.h>
#include <anabranch/moe_layer.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <gtest/gtest.h>
#include <torch/cuda.h>

#include <algorithm>

#include "support/devices.h"
#include "support/random.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

constexpr int64_t kTokens = 700;
constexpr int64_t kExperts = 24;
constexpr int64_t kTopK = 4;

MoEOptions options_of(torch::Dtype dtype, bool bias) {
  MoEOptions options;
  options.hidden_size = 128;
  options.expert_hidden_size = 64;
  options.num_experts = kExperts;
  options.top_k = kTopK;
  options.glu = true;
  options.bias = bias;
  options.activation = Activation::kSilu;
  options.dtype = dtype;
  options.device = device();
  // In eager steps, too, which may else find another one quicker for their routing.
  options.engine = "hopper";
  return options;
}

/// Everything that a step finds: output, losses, load and all gradients.
std::vector<torch::Tensor> step(MoELayer& layer, torch::Tensor x, const torch::Tensor& doutput,
                                const std::optional<Routing>& routing) {
  x = x.detach().requires_grad_();
  layer->zero_grad();
  const auto out = routing ? layer->forward(x, *routing) : layer->forward(x);
  auto loss = (out.output.to(torch::kFloat32) * doutput).sum();
  if (out.balance_loss.defined()) {
    loss = loss + 0.1 * out.balance_loss + 0.01 * out.z_loss;
  }
  loss.backward();
  std::vector<torch::Tensor> found = {out.output.detach(), loss.detach(), out.expert_load,
                                      x.grad()};
  for (const auto& parameter : layer->parameters()) {
    if (parameter.grad().defined()) found.push_back(parameter.grad());
  }
  return found;
}

/// Distinct experts of each token: at random, the first ones of all, or the same few with one other.
torch::Tensor draw_ids(Random& random, int turn) {
  auto ids =
      random.uniform({kTokens, kExperts}).argsort(1, /*descending=*/false).narrow(1, 0, kTopK);
  if (turn % 4 == 1) {
    ids = torch::arange(kTopK).expand({kTokens, kTopK});
  } else if (turn % 4 == 2) {
    ids = torch::cat({torch::arange(kTopK - 1).expand({kTokens, kTopK - 1}),
                      torch::full({kTokens, 1}, kExperts - 1, torch::kInt64)},
                     1);
  }
  return ids.contiguous();
}

class CudaGraphTest : public ::testing::Test {
 protected:
  void SetUp() override {
    const auto engines = grouped_gemm_engines(device());
    if (std::count(engines.begin(), engines.end(), "hopper") == 0) {
      GTEST_SKIP() << "no engine here reads its counts from GPU memory";
    }
    if (!world()->reads_counts_on(device())) {
      GTEST_SKIP() << world()->name() << " does not read counts on " << device();
    }
  }

  /// On several ranks each has tokens of its own, and room for any routing.
  void expect_replays_equal_eager(MoEOptions options, bool routed_outside, int replays) {
    options.receive_capacity = world()->size();
    MoELayer layer(options, world());
    auto x =
        torch::empty({kTokens, options.hidden_size}, torch::dtype(options.dtype).device(device()));
    auto doutput = torch::empty({kTokens, options.hidden_size}, torch::device(device()));
    std::optional<Routing> routing;
    if (routed_outside) {
      routing.emplace();
      routing->expert_ids =
          torch::empty({kTokens, kTopK}, torch::dtype(torch::kInt64).device(device()));
      routing->weights = torch::empty({kTokens, kTopK}, torch::device(device()));
    }
    const auto fill = [&](int turn) {
      // Rows of a token seen once only, or all alike: nearly all experts then have none.
      const auto rows = random_.normal(
          {world()->size(), turn % 4 == 3 ? 1 : kTokens, options.hidden_size}, torch::kFloat32);
      x.copy_(rows[world()->rank()].expand(x.sizes()));
      doutput.copy_(random_.normal(doutput.sizes(), torch::kFloat32));
      if (routing) {
        routing->expert_ids.copy_(draw_ids(random_, turn));
        routing->weights.copy_(random_.normal(routing->weights.sizes(), torch::kFloat32).abs());
      }
    };
    at::cuda::CUDAGraph graph;
    std::vector<torch::Tensor> recorded;
    const auto stream = c10::cuda::getStreamFromPool(false, device().index());
    {
      const c10::cuda::CUDAStreamGuard guard(stream);
      fill(0);
      for (int i = 0; i < 3; ++i) {
        step(layer, x, doutput, routing);  // engines are chosen
      }
      layer->zero_grad(/*set_to_none=*/true);
      stream.synchronize();
      graph.capture_begin();
      recorded = step(layer, x, doutput, routing);
      graph.capture_end();
    }
    for (int turn = 0; turn < replays; ++turn) {
      fill(turn);
      torch::cuda::synchronize();
      graph.replay();
      torch::cuda::synchronize();
      std::vector<torch::Tensor> replayed;
      for (const auto& tensor : recorded) replayed.push_back(tensor.clone());
      MoELayer eager(options, world());
      const auto expected = step(eager, x, doutput, routing);
      ASSERT_EQ(replayed.size(), expected.size());
      for (size_t i = 0; i < expected.size(); ++i) {
        ASSERT_TRUE(replayed[i].equal(expected[i])) << "turn " << turn << ", tensor " << i;
      }
    }
    check();
  }

  Random random_{test_seed()};
};

TEST_F(CudaGraphTest, ReplaysEqualEager) {
  expect_replays_equal_eager(options_of(torch::kBFloat16, false), false, 100);
  expect_replays_equal_eager(options_of(torch::kFloat16, true), false, 20);
}

// As many launches, whatever the rounds that the recorded step took.
TEST_F(CudaGraphTest, ReplaysOfSinkhornEqualEager) {
  auto options = options_of(torch::kBFloat16, false);
  options.gate = Gate::kSinkhorn;
  expect_replays_equal_eager(options, false, 20);
}

TEST_F(CudaGraphTest, ReplaysOfRoutingFromOutsideEqualEager) {
  expect_replays_equal_eager(options_of(torch::kBFloat16, true), true, 100);
}

// Rank by rank alike, some replays go beyond the room, and are done again without graph and bound.
TEST_F(CudaGraphTest, RunDoesReplaysBeyondTheRoomAgain) {
  ANABRANCH_NEEDS_RANKS(2);
  auto options = options_of(torch::kBFloat16, false);
  options.engine =
      "hopper";  // with a bound there are other numbers of rows, by which auto would choose
  MoELayer exact(options, world());
  options.receive_capacity = 1.3;
  MoELayer layer(options, world());
  const auto x = on_device(random_.normal({kTokens, options.hidden_size}, torch::kBFloat16));
  const auto dy = on_device(random_.normal({kTokens, options.hidden_size}, torch::kFloat32));
  std::optional<Routing> routing(std::in_place);
  routing->expert_ids = on_device(draw_ids(random_, 0));
  routing->weights = on_device(torch::rand({kTokens, kTopK}));
  at::cuda::CUDAGraph graph;
  std::vector<torch::Tensor> recorded;
  const auto stream = c10::cuda::getStreamFromPool(false, device().index());
  const c10::cuda::CUDAStreamGuard guard(stream);
  for (int i = 0; i < 3; ++i) {
    step(layer, x, dy, routing);
  }
  layer->zero_grad(/*set_to_none=*/true);
  stream.synchronize();
  graph.capture_begin();
  recorded = step(layer, x, dy, routing);
  graph.capture_end();
  int again = 0, beyond = 0;
  for (int turn = 0; turn < 12; ++turn) {
    const auto ids = draw_ids(random_, turn);  // of every rank
    routing->expert_ids.copy_(ids);
    const auto of_ranks = torch::bincount(ids.div(kExperts / world()->size(), "floor").flatten(),
                                          {}, world()->size());
    const auto fullest = of_ranks.max().item<int64_t>() * world()->size();
    beyond += static_cast<double>(fullest) > options.receive_capacity * kTokens * kTopK ? 1 : 0;
    const auto found = run(
        [&] {
          graph.replay();
          std::vector<torch::Tensor> replayed;
          for (const auto& tensor : recorded) replayed.push_back(tensor.clone());
          return replayed;
        },
        [&] { return ++again, step(layer, x, dy, routing); });
    layer->zero_grad(/*set_to_none=*/true);
    const auto expected = step(exact, x, dy, routing);
    ASSERT_EQ(found.size(), expected.size());
    for (size_t i = 0; i < found.size(); ++i) {
      ASSERT_TRUE(found[i].equal(expected[i])) << "turn " << turn << ", tensor " << i;
    }
  }
  EXPECT_GE(beyond, 3);  // those in which all tokens go to the first experts, rank 0's
  EXPECT_EQ(again, beyond);
  check();
}

}  // namespace
}  // namespace anabranch::test
