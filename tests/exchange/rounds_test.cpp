// Steps in which a rank is sent more rows than it may hold.
#include "exchange/rounds.h"

#include <anabranch/error.h>
#include <anabranch/moe_layer.h>
#include <gtest/gtest.h>

#include <numeric>
#include <set>

#include "support/devices.h"
#include "support/layer_case.h"
#include "support/memory_meter.h"
#include "support/random_routing.h"
#include "support/tolerance.h"
#include "support/routing_case.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

int64_t sum(const std::vector<int64_t>& values) {
  return std::accumulate(values.begin(), values.end(), int64_t{0});
}

/// Every assignment in one round, no round with more rows than allowed, and no more rounds than by the
/// definition: the fewest in which even shares fit.
TEST(Rounds, ShareTheRowsOfAStep) {
  ANABRANCH_NEEDS_RANKS(2);
  Random random(test_seed());
  const int ranks = world()->size();
  for (int64_t i = effort(20); i > 0; --i) {
    const int64_t experts = random.integer(1, 4 * ranks);
    const int64_t top_k = random.integer(1, experts);
    const int64_t tokens = 40;
    const auto ids =
        random_expert_ids(random, tokens * ranks, experts, top_k, random.pick(all_skews()))
            .narrow(0, tokens * world()->rank(), tokens)
            .contiguous();
    const int64_t limit = ranks + random.integer(0, 40);
    const Exchange exchange(world(), experts);
    const auto plan = exchange.plan(routing_of(ids));
    const int64_t rounds = count_rounds(plan, limit, *world());
    SCOPED_TRACE(c10::str("E ", experts, " k ", top_k, " limit ", limit, " rounds ", rounds));
    const auto all = world()->all_gather(torch::tensor(plan.receive_rows));
    const auto most_of = [&](int64_t n) {
      return n == 0 ? INT64_MAX : ((all + n - 1).div(n, "trunc")).sum(1).max().item<int64_t>();
    };
    EXPECT_LE(most_of(rounds), limit);
    EXPECT_GT(most_of(rounds - 1), limit);

    std::multiset<int64_t> assignments;
    std::vector<int64_t> arrived(plan.expert_counts.experts(), 0);
    for (const auto& round : in_rounds(plan, rounds).plans) {
      EXPECT_LE(sum(round.receive_rows), limit);
      EXPECT_EQ(sum(round.receive_rows), round.rows());
      const auto order = round.send_order.cpu().contiguous();
      const auto* begin = order.const_data_ptr<int64_t>();
      assignments.insert(begin, begin + order.numel());
      for (size_t e = 0; e < arrived.size(); ++e) arrived[e] += round.expert_counts.on_host()[e];
    }
    EXPECT_EQ(assignments.size(), static_cast<size_t>(ids.numel()));
    EXPECT_EQ(std::set<int64_t>(assignments.begin(), assignments.end()).size(), assignments.size());
    EXPECT_EQ(arrived, plan.expert_counts.on_host());
  }
}

TEST(Rounds, GiveTheResultsOfOneInMoreCalls) {
  Random random(test_seed());
  MoEOptions options;
  options.hidden_size = 16;
  options.expert_hidden_size = 24;
  options.num_experts = 6;
  options.top_k = 3;
  options.dtype = torch::kFloat64;
  for (const auto skew : all_skews()) {
    auto layer_case =
        draw_layer_case(random, world()->size(), options, 60, skew, Split::kUneven, true);
    layer_case.options.engine = device().is_cuda() ? "cublas_loop_1" : "auto";
    const auto run = [&](int64_t limit) {
      layer_case.options.receive_rows_limit = limit;
      auto layer = make_layer(layer_case, world());
      world()->reset_traffic();
      auto step = run_step(layer, layer_case, layer_case.counts, world()->rank());
      return std::pair{step, world()->traffic().collectives};
    };
    const auto [whole, calls] = run(0);
    const auto [unlimited, same_calls] = run(60);
    const auto [in_rounds, more_calls] = run(world()->size());
    EXPECT_TRUE(identical(unlimited.output.output, whole.output.output));
    const auto limit = tolerance(torch::kFloat64, 100, 10);
    EXPECT_TRUE(close(in_rounds.output.output, whole.output.output, limit));
    EXPECT_TRUE(close(in_rounds.x.grad(), whole.x.grad(), limit));
    EXPECT_TRUE(close(in_rounds.weights.grad(), whole.weights.grad(), limit));
    if (world()->size() > 1) {
      EXPECT_GT(more_calls, calls);
    }
  }
}

/// Bytes of memory at most, in forward and backward of a step in which all tokens go to one rank's expert.
struct Peaks {
  int64_t forward = 0;
  int64_t backward = 0;
};

/// Of the second step of a layer, in which `tokens` of each rank choose the last rank's expert.
Peaks peaks_of(const MoEOptions& options, int64_t tokens) {
  MoELayer layer(options, world());
  const auto of_tokens = [&](int64_t width) { return torch::ones({tokens, width}); };
  Peaks found;
  for (int step = 0; step < 2; ++step) {
    layer->zero_grad();
    const auto x = of_tokens(options.hidden_size).requires_grad_();
    const auto dy = of_tokens(options.hidden_size);
    Routing routing;
    routing.weights = of_tokens(1).requires_grad_();
    routing.expert_ids = torch::full({tokens, 1}, options.num_experts - 1, torch::kLong);
    MemoryMeter meter(options.device);
    auto out = layer->forward(x, routing).output;
    found.forward = meter.take_most();
    out.backward(dy);
    found.backward = meter.take_most();
  }
  return found;
}

/// What the last rank may have: of each row that is received at once what passes through an expert's products, of each
/// assignment that is received in all indices alone, of each of its own tokens what comes back.
TEST(Rounds, BoundTheMemoryOfTheRankThatAllTokensGoTo) {
  ANABRANCH_NEEDS_RANKS(2);
  if (device().is_cuda()) GTEST_SKIP() << "counted in the host's memory";
  const int ranks = world()->size();
  const bool receives = world()->rank() == ranks - 1;
  MoEOptions options;
  options.hidden_size = 128;
  options.expert_hidden_size = 96;
  options.num_experts = ranks;
  options.top_k = 1;
  options.renormalize = false;
  options.engine = "deterministic";
  constexpr int64_t kTokens = 320;
  const int64_t limit = 16 * ranks;  // a twentieth of what comes
  for (const bool has_tokens : {false, true}) {
    const int64_t own = has_tokens || !receives ? kTokens : 0;
    const int64_t received = kTokens * (ranks - 1) + own;
    // Numbers of 4 bytes, of a row: x, dy, their copies by expert, results and sums; hidden, activation and both their
    // gradients. Of a token: what comes back, its sum, and a gradient.
    const int64_t row = 6 * options.hidden_size + 4 * options.expert_hidden_size;
    const int64_t token = 4 * options.hidden_size;
    const int64_t weights = 2 * options.hidden_size * options.expert_hidden_size;
    constexpr int64_t kIndices = 2 * 24;  // of 8 bytes, of an assignment: less than half of a row
    const auto allowed = 4 * (limit * row + own * token + received * kIndices + 2 * weights);
    options.receive_rows_limit = limit;
    const Peaks limited = peaks_of(options, own);
    options.receive_rows_limit = 0;
    const Peaks unlimited = peaks_of(options, own);
    if (!receives) continue;
    EXPECT_LE(limited.forward, allowed);
    EXPECT_LE(limited.backward, allowed);
    EXPECT_GT(unlimited.forward, allowed);
    EXPECT_GT(unlimited.backward, allowed);
  }
}

TEST(Rounds, AreRefusedWhereNoRowOfARankFits) {
  MoEOptions options;
  options.hidden_size = options.expert_hidden_size = options.num_experts = 4;
  options.receive_rows_limit = -1;
  EXPECT_THROW(MoELayer(options, world()), InputError);
  options.receive_rows_limit = world()->size() - 1;
  if (world()->size() > 1) {
    EXPECT_THROW(MoELayer(options, world()), InputError);
  }
}

}  // namespace
}  // namespace anabranch::test
