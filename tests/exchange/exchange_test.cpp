#include <anabranch/exchange.h>
#include <anabranch/moe_layer.h>
#include <gtest/gtest.h>

#include "support/collectives.h"
#include "support/devices.h"
#include "support/routing_case.h"
#include "support/thrown.h"
#include "support/tolerance.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

// Who goes where, from everybody's ids: (source, token, slot) of each local assignment by (expert,
// source, token), and (source, token) of each received row.
struct Arrivals {
  std::vector<int64_t> flat_of_assignment;  // into the global [tokens · top_k]
  std::vector<int64_t> token_of_row;        // into the global [tokens]
};

Arrivals arrivals_at(const RoutingCase& routed, const ExpertPlacement& placement, int64_t rank) {
  const auto first = placement.first_place(rank);
  const auto last = first + placement.local_experts(rank);
  const auto ids = routed.expert_ids.accessor<int64_t, 2>();
  Arrivals arrivals;
  for (int64_t t = 0; t < routed.tokens; ++t) {
    bool comes = false;
    for (int64_t k = 0; k < routed.top_k; ++k) {
      comes = comes || (ids[t][k] >= first && ids[t][k] < last);
    }
    if (comes) {
      arrivals.token_of_row.push_back(t);
    }
  }
  for (int64_t e = first; e < last; ++e) {
    for (int64_t t = 0; t < routed.tokens; ++t) {
      for (int64_t k = 0; k < routed.top_k; ++k) {
        if (ids[t][k] == e) {
          arrivals.flat_of_assignment.push_back(t * routed.top_k + k);
        }
      }
    }
  }
  return arrivals;
}

class ExchangeTest : public ::testing::Test {
 protected:
  Routing local_routing(const RoutingCase& routed) const {
    Routing routing;
    routing.expert_ids = routed.local(routed.expert_ids, rank_);
    routing.weights = torch::ones_like(routing.expert_ids, torch::kFloat32);
    return routing;
  }
  std::shared_ptr<Communicator> world_ = world();
  int rank_ = world_->rank();
  Random random_{test_seed()};
};

TEST_F(ExchangeTest, DispatchBringsEachTokenOnceAndEveryValue) {
  for (const auto& routed : routing_cases(random_, world_->size(), effort(80))) {
    const auto dtype = random_.pick(all_dtypes());
    const auto hidden = random_.pick<int64_t>({1, 3, 16, 65});
    SCOPED_TRACE(c10::str(routed.describe(), " h ", hidden, " ", to_string(dtype)));
    const auto x = random_.normal({routed.tokens, hidden}, dtype);
    const auto values = random_.normal({routed.tokens, routed.top_k}, accumulation_type(dtype));

    const Exchange exchange(world_, routed.num_experts);
    const auto plan = exchange.plan(local_routing(routed));
    const auto sent =
        exchange.dispatch({routed.local(x, rank_), routed.local(values, rank_)}, plan);

    const auto arrivals = arrivals_at(routed, exchange.placement(), rank_);
    const auto rows = torch::tensor(arrivals.token_of_row, torch::kInt64);
    const auto flat = torch::tensor(arrivals.flat_of_assignment, torch::kInt64);
    EXPECT_TRUE(identical(sent.rows, x.index_select(0, rows)));
    EXPECT_TRUE(identical(sent.values, values.reshape({-1}).index_select(0, flat)));
    EXPECT_TRUE(identical(exchange.dispatch({routed.local(x, rank_), {}}, plan).rows, sent.rows));
  }
}

TEST_F(ExchangeTest, CombineSumsTheRowsOfATokenAndReturnsEveryValue) {
  for (const auto& routed : routing_cases(random_, world_->size(), effort(80))) {
    const auto dtype = random_.pick(all_dtypes());
    const auto hidden = random_.pick<int64_t>({1, 3, 16, 65});
    SCOPED_TRACE(c10::str(routed.describe(), " h ", hidden, " ", to_string(dtype)));
    const Exchange exchange(world_, routed.num_experts);
    const auto plan = exchange.plan(local_routing(routed));
    // What rank w returns for token t, and for each assignment; drawn for all ranks everywhere.
    auto sum = torch::zeros({routed.tokens, hidden}, torch::kFloat64);
    auto magnitude = torch::zeros_like(sum);
    auto values = torch::zeros({routed.tokens * routed.top_k}, accumulation_type(dtype));
    Payload own;
    for (int w = 0; w < world_->size(); ++w) {
      const auto arrivals = arrivals_at(routed, exchange.placement(), w);
      const auto row_tokens = torch::tensor(arrivals.token_of_row, torch::kInt64);
      const auto flat = torch::tensor(arrivals.flat_of_assignment, torch::kInt64);
      const auto rows = random_.normal({row_tokens.size(0), hidden}, dtype);
      const auto results = random_.normal({flat.size(0)}, accumulation_type(dtype));
      sum.index_add_(0, row_tokens, rows.to(torch::kFloat64));
      magnitude.index_add_(0, row_tokens, rows.to(torch::kFloat64).abs());
      values.index_copy_(0, flat, results);
      if (w == rank_) {
        own = {on_device(rows), on_device(results)};
      }
    }
    const auto combined = exchange.combine(own, plan);
    EXPECT_EQ(combined.rows.scalar_type(), dtype);
    EXPECT_TRUE(close(combined.rows, routed.local(sum, rank_),
                      tolerance(dtype, world_->size(), routed.local(magnitude, rank_))));
    EXPECT_TRUE(identical(combined.values,
                          routed.local(values.reshape({routed.tokens, routed.top_k}), rank_)));
    EXPECT_TRUE(identical(exchange.combine({own.rows, {}}, plan).rows, combined.rows));
  }
}

// 16-bit partial sums are added in fp32 and rounded once: 256 + 1 is lost in bf16, 256 + 1 + 1 is
// not when it is added up first.
TEST_F(ExchangeTest, CombineRoundsOnce) {
  ANABRANCH_NEEDS_RANKS(3);
  const int ranks = world_->size();
  const Exchange exchange(world_, ranks);
  Routing routing;
  routing.expert_ids = on_device(torch::arange(ranks).unsqueeze(0).contiguous());
  routing.weights = on_device(torch::ones({1, ranks}));
  const auto plan = exchange.plan(routing);
  const double part = rank_ == 0 ? 256 : (rank_ <= 2 ? 1 : 0);
  const auto rows = on_device(torch::full({plan.rows(), 4}, part, torch::kBFloat16));
  const auto combined = exchange.combine({rows, {}}, plan).rows;
  EXPECT_TRUE(identical(combined, torch::full({1, 4}, 258, torch::kBFloat16)));
}

// ⟨dispatch x, y⟩ = ⟨x, combine y⟩, summed over all ranks, for rows and values.
TEST_F(ExchangeTest, CombineIsTheAdjointOfDispatch) {
  for (const auto& routed : routing_cases(random_, world_->size(), effort(50))) {
    SCOPED_TRACE(routed.describe());
    const int64_t hidden = 7;
    const Exchange exchange(world_, routed.num_experts);
    const auto plan = exchange.plan(local_routing(routed));
    Random own(test_seed() + static_cast<uint64_t>(rank_));
    const auto draw = [&](torch::IntArrayRef sizes) { return on_device(own.normal(sizes)); };
    const Payload x = {draw({plan.tokens, hidden}), draw({plan.tokens, plan.top_k})};
    const Payload y = {draw({plan.rows(), hidden}), draw({plan.assignments()})};
    const auto there = exchange.dispatch(x, plan);
    const auto back = exchange.combine(y, plan);
    const auto dot = [&](const torch::Tensor& a, const torch::Tensor& b) {
      return sum_over_ranks(*world_, (a * b).sum().item<double>());
    };
    const auto magnitude = [&](const torch::Tensor& a, const torch::Tensor& b) {
      return sum_over_ranks(*world_, (a * b).abs().sum().item<double>());
    };
    const auto length = routed.tokens * routed.num_experts * hidden + world_->size();
    EXPECT_NEAR(dot(there.rows, y.rows), dot(x.rows, back.rows),
                2 * tolerance(torch::kFloat64, length, magnitude(there.rows, y.rows)));
    EXPECT_NEAR(dot(there.values, y.values), dot(x.values, back.values),
                2 * tolerance(torch::kFloat64, length, magnitude(there.values, y.values)));
  }
}

TEST_F(ExchangeTest, OneRankMovesNothing) {
  const auto self = make_self_communicator();
  const auto routed = make_routing_case(random_, 1, 8, 3, 20, Skew::kUniform, Split::kEven);
  const Exchange exchange(self, 8);
  Routing routing;
  routing.expert_ids = on_device(routed.expert_ids);
  routing.weights = on_device(torch::ones({20, 3}));
  const auto plan = exchange.plan(routing);
  const auto x = on_device(random_.normal({20, 5}, torch::kFloat32));
  EXPECT_TRUE(identical(exchange.dispatch({x, {}}, plan).rows, x));
  EXPECT_TRUE(identical(exchange.combine({x, {}}, plan).rows, x));
  EXPECT_EQ(exchange.dispatch({x, {}}, plan).rows.data_ptr(), x.data_ptr());  // not even a copy
  EXPECT_EQ(self->traffic().bytes_sent, 0);
}

// Rows cross once per (token, rank), values once per assignment, nothing else does.
TEST_F(ExchangeTest, SendsTheDeduplicatedMinimum) {
  for (const auto& routed : routing_cases(random_, world_->size(), effort(30))) {
    SCOPED_TRACE(routed.describe());
    const int64_t hidden = 24;
    const Exchange exchange(world_, routed.num_experts);
    const auto plan = exchange.plan(local_routing(routed));
    const auto rows_to = [&](int source, int destination) {
      const auto arrivals = arrivals_at(routed, exchange.placement(), destination);
      const auto begin =
          std::accumulate(routed.counts.begin(), routed.counts.begin() + source, int64_t{0});
      return std::count_if(
          arrivals.token_of_row.begin(), arrivals.token_of_row.end(),
          [&](int64_t t) { return t >= begin && t < begin + routed.counts[source]; });
    };
    int64_t out = 0;
    int64_t in = 0;
    for (int w = 0; w < world_->size(); ++w) {
      out += w == rank_ ? 0 : rows_to(rank_, w);
      in += w == rank_ ? 0 : rows_to(w, rank_);
    }
    const auto x = on_device(random_.normal({plan.tokens, hidden}, torch::kBFloat16));
    world_->reset_traffic();
    const auto there = exchange.dispatch({x, {}}, plan);
    EXPECT_EQ(world_->traffic().bytes_sent, out * hidden * 2);
    EXPECT_EQ(world_->traffic().bytes_received, in * hidden * 2);
    world_->reset_traffic();
    exchange.combine(there, plan);
    EXPECT_EQ(world_->traffic().bytes_sent, in * hidden * 2);
    EXPECT_EQ(world_->traffic().bytes_received, out * hidden * 2);

    const auto elsewhere = [&](const std::vector<int64_t>& counts) {
      return std::accumulate(counts.begin(), counts.end(), int64_t{0}) - counts[rank_];
    };
    world_->reset_traffic();
    exchange.dispatch({x, on_device(torch::ones({plan.tokens, plan.top_k}))}, plan);
    EXPECT_EQ(world_->traffic().bytes_sent,
              out * hidden * 2 + elsewhere(plan.send_assignments) * 4);
    EXPECT_EQ(world_->traffic().bytes_received,
              in * hidden * 2 + elsewhere(plan.receive_assignments) * 4);
  }
}

TEST_F(ExchangeTest, WorksWithinASubgroup) {
  ANABRANCH_NEEDS_RANKS(2);
  const auto group = world_->split(rank_ % 2, rank_);
  const auto routed =
      make_routing_case(random_, group->size(), 5, 2, 20, Skew::kUniform, Split::kUneven);
  const Exchange exchange(group, 5);
  Routing routing;
  routing.expert_ids = routed.local(routed.expert_ids, group->rank());
  routing.weights = torch::ones_like(routing.expert_ids, torch::kFloat32);
  const auto plan = exchange.plan(routing);
  const auto x = random_.normal({20, 3}, torch::kFloat32);
  const auto sent = exchange.dispatch({routed.local(x, group->rank()), {}}, plan);
  const auto rows = arrivals_at(routed, exchange.placement(), group->rank()).token_of_row;
  EXPECT_TRUE(identical(sent.rows, x.index_select(0, torch::tensor(rows, torch::kInt64))));
}

TEST_F(ExchangeTest, RefusesPayloadsThatDoNotFitThePlan) {
  const auto routed = make_routing_case(random_, world_->size(), 6, 2, 5 * world_->size(),
                                        Skew::kUniform, Split::kEven);
  const Exchange exchange(world_, 6);
  const auto plan = exchange.plan(local_routing(routed));
  const auto before = world_->traffic().collectives;
  EXPECT_INPUT_ERROR(exchange.dispatch({torch::zeros({4, 3}), {}}, plan), "5");
  EXPECT_INPUT_ERROR(exchange.dispatch({torch::zeros({5}), {}}, plan), "[5]");
  EXPECT_INPUT_ERROR(exchange.dispatch({torch::zeros({5, 3}), torch::zeros({5, 1})}, plan),
                     "[5, 1]");
  EXPECT_INPUT_ERROR(exchange.dispatch({torch::Tensor(), {}}, plan), "rows");
  EXPECT_INPUT_ERROR(exchange.combine({torch::zeros({plan.rows() + 1, 3}), {}}, plan),
                     std::to_string(plan.rows()));
  EXPECT_INPUT_ERROR(
      exchange.combine({torch::zeros({plan.rows(), 3}), torch::zeros({plan.assignments() + 1})},
                       plan),
      std::to_string(plan.assignments()));
  EXPECT_EQ(world_->traffic().collectives, before);
}

// Ranks that were given different things are all told who and what, also where a message of another
// size would end the process; and go on.
TEST_F(ExchangeTest, RanksThatDisagreeAreAllTold) {
  ANABRANCH_NEEDS_RANKS(2);
  const int culprit = world_->size() - 1;
  const Exchange exchange(world_, 4);
  Routing good;
  good.expert_ids = on_device(torch::tensor({{0}, {3}}, torch::kInt64));
  good.weights = on_device(torch::ones({2, 1}));
  const auto rows = on_device(torch::ones({2, 6}));
  const auto expect_told = [&](const Routing& routing, const torch::Tensor& other,
                               const std::string& text) {
    const bool differs = rank_ == culprit;
    const auto thrown = thrown_by([&] {
      const auto plan = exchange.plan(differs ? routing : good, differs ? other : rows);
      exchange.dispatch({differs ? other : rows, {}}, plan);
    });
    EXPECT_EQ(thrown.kind, Thrown::Kind::kCommunication) << thrown;
    EXPECT_EQ(thrown.peers, std::vector<int>{culprit}) << thrown;
    EXPECT_TRUE(thrown.says(c10::str("rank ", culprit, " has ", text))) << thrown;
    EXPECT_EQ(exchange.plan(good, rows).tokens, 2);
  };
  expect_told(
      good, rows.to(torch::kBFloat16),
      "rows of 6 BFloat16, weights of Float, a routing from outside where rank 0 has rows of "
      "6 Float, weights of Float");
  expect_told(good, on_device(torch::ones({2, 9})), "rows of 9 Float");
  Routing of_gate = good;
  of_gate.probability_sum = on_device(torch::ones({4}));
  of_gate.squared_logsumexp_sum = on_device(torch::ones({}));
  expect_told(of_gate, rows, "rows of 6 Float, weights of Float, a gate's routing");
  Routing in_double = good;
  in_double.weights = good.weights.to(torch::kDouble);
  expect_told(in_double, rows, "rows of 6 Float, weights of Double");
}

TEST_F(ExchangeTest, ARankOfALayerThatAloneIsGivenARoutingIsNamedOnAll) {
  ANABRANCH_NEEDS_RANKS(2);
  const int culprit = world_->size() - 1;
  MoEOptions options;
  options.hidden_size = options.expert_hidden_size = 8;
  options.num_experts = 4;
  options.top_k = 2;
  options.device = device();
  MoELayer layer(options, world_);
  const auto x = on_device(random_.normal({3, 8}, torch::kFloat32));
  Routing outside;
  outside.expert_ids = on_device(torch::tensor({{0, 1}, {2, 3}, {3, 0}}, torch::kInt64));
  outside.weights = on_device(torch::ones({3, 2}));
  const auto thrown = thrown_by([&] {
    if (rank_ == culprit) {
      layer->forward(x, outside);
    } else {
      layer->forward(x);
    }
  });
  EXPECT_EQ(thrown.kind, Thrown::Kind::kCommunication) << thrown;
  EXPECT_EQ(thrown.peers, std::vector<int>{culprit}) << thrown;
  EXPECT_TRUE(thrown.says("a routing from outside where rank 0 has")) << thrown;
  EXPECT_EQ(layer->forward(x).output.sizes(), x.sizes());
}

}  // namespace
}  // namespace anabranch::test
