#include <anabranch/exchange.h>
#include <gtest/gtest.h>

#include <limits>
#include <map>
#include <set>
#include <tuple>

#include "support/devices.h"
#include "support/routing_case.h"
#include "support/thrown.h"
#include "support/tolerance.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

using Numbers = std::vector<int64_t>;

Numbers numbers(const torch::Tensor& tensor) {
  const auto flat = tensor.cpu().contiguous();
  EXPECT_EQ(flat.scalar_type(), torch::kInt64);
  return Numbers(flat.const_data_ptr<int64_t>(), flat.const_data_ptr<int64_t>() + flat.numel());
}

// The plan of one rank, from the definitions, out of everybody's expert ids.
struct NaivePlan {
  Numbers send_rows, receive_rows, send_assignments, receive_assignments, expert_counts;
  Numbers send_tokens, token_offsets, token_rows, send_order;
  Numbers received_order, assignment_rows, row_offsets, row_assignments;
};

// Blocks in rank order, the first E mod W ranks hold one more.
int64_t owner_of(int64_t expert, int64_t num_experts, int64_t ranks) {
  int64_t next = 0;
  for (int64_t r = 0; r < ranks; ++r) {
    next += num_experts / ranks + (r < num_experts % ranks ? 1 : 0);
    if (expert < next) {
      return r;
    }
  }
  return -1;
}

std::vector<std::vector<Numbers>> ids_by_rank(const RoutingCase& routed) {
  std::vector<std::vector<Numbers>> ids;  // [rank][token][slot]
  int64_t token = 0;
  for (const auto count : routed.counts) {
    ids.emplace_back();
    for (int64_t t = 0; t < count; ++t) {
      ids.back().push_back(numbers(routed.expert_ids[token++]));
    }
  }
  return ids;
}

void plan_source(NaivePlan& plan, const std::vector<Numbers>& ids, int64_t num_experts,
                 int64_t ranks) {
  const auto tokens = static_cast<int64_t>(ids.size());
  std::vector<Numbers> rows_of_token(ids.size());
  for (int64_t destination = 0; destination < ranks; ++destination) {
    int64_t rows = 0;
    int64_t assignments = 0;
    for (int64_t t = 0; t < tokens; ++t) {
      int64_t here = 0;
      for (const auto expert : ids[t]) {
        here += owner_of(expert, num_experts, ranks) == destination ? 1 : 0;
      }
      assignments += here;
      if (here > 0) {
        rows_of_token[t].push_back(static_cast<int64_t>(plan.send_tokens.size()));
        plan.send_tokens.push_back(t);
        ++rows;
      }
    }
    plan.send_rows.push_back(rows);
    plan.send_assignments.push_back(assignments);
  }
  plan.token_offsets.push_back(0);
  for (const auto& rows : rows_of_token) {
    plan.token_rows.insert(plan.token_rows.end(), rows.begin(), rows.end());
    plan.token_offsets.push_back(static_cast<int64_t>(plan.token_rows.size()));
  }
  for (int64_t expert = 0; expert < num_experts; ++expert) {
    for (int64_t t = 0; t < tokens; ++t) {
      for (size_t slot = 0; slot < ids[t].size(); ++slot) {
        if (ids[t][slot] == expert) {
          plan.send_order.push_back(t * static_cast<int64_t>(ids[t].size()) +
                                    static_cast<int64_t>(slot));
        }
      }
    }
  }
}

void plan_experts(NaivePlan& plan, const std::vector<std::vector<Numbers>>& ids, int64_t rank,
                  int64_t num_experts) {
  const auto ranks = static_cast<int64_t>(ids.size());
  std::map<std::pair<int64_t, int64_t>, int64_t> received_row;     // of (source, token)
  std::map<std::tuple<int64_t, int64_t, int64_t>, int64_t> place;  // of (source, expert, token)
  for (int64_t source = 0; source < ranks; ++source) {
    int64_t rows = 0;
    std::set<std::pair<int64_t, int64_t>> arrivals;  // (expert, token)
    for (size_t t = 0; t < ids[source].size(); ++t) {
      const auto token = static_cast<int64_t>(t);
      for (const auto expert : ids[source][t]) {
        if (owner_of(expert, num_experts, ranks) == rank) {
          arrivals.emplace(expert, token);
          rows += received_row.emplace(std::pair(source, token), received_row.size()).second;
        }
      }
    }
    for (const auto& [expert, token] : arrivals) {
      place.emplace(std::tuple(source, expert, token), place.size());
    }
    plan.receive_rows.push_back(rows);
    plan.receive_assignments.push_back(static_cast<int64_t>(arrivals.size()));
  }
  std::vector<Numbers> assignments_of_row(received_row.size());
  for (int64_t expert = 0; expert < num_experts; ++expert) {
    if (owner_of(expert, num_experts, ranks) != rank) {
      continue;
    }
    int64_t count = 0;
    for (int64_t source = 0; source < ranks; ++source) {
      for (size_t t = 0; t < ids[source].size(); ++t) {
        const auto found = place.find({source, expert, static_cast<int64_t>(t)});
        if (found != place.end()) {
          const auto row = received_row.at({source, static_cast<int64_t>(t)});
          assignments_of_row[row].push_back(static_cast<int64_t>(plan.received_order.size()));
          plan.received_order.push_back(found->second);
          plan.assignment_rows.push_back(row);
          ++count;
        }
      }
    }
    plan.expert_counts.push_back(count);
  }
  plan.row_offsets.push_back(0);
  for (const auto& assignments : assignments_of_row) {
    plan.row_assignments.insert(plan.row_assignments.end(), assignments.begin(), assignments.end());
    plan.row_offsets.push_back(static_cast<int64_t>(plan.row_assignments.size()));
  }
}

NaivePlan naive_plan(const RoutingCase& routed, int64_t rank) {
  const auto ids = ids_by_rank(routed);
  NaivePlan plan;
  plan_source(plan, ids[rank], routed.num_experts, static_cast<int64_t>(ids.size()));
  plan_experts(plan, ids, rank, routed.num_experts);
  return plan;
}

class PlanTest : public ::testing::Test {
 protected:
  std::shared_ptr<Communicator> world_ = world();
  int rank_ = world_->rank();
  Random random_{test_seed()};
};

TEST_F(PlanTest, EqualsTheDefinitions) {
  for (const auto& routed : routing_cases(random_, world_->size(), effort(120))) {
    SCOPED_TRACE(routed.describe());
    const Exchange exchange(world_, routed.num_experts);
    const auto local_ids = routed.local(routed.expert_ids, rank_);
    const auto plan = exchange.plan(routing_of(local_ids));
    const auto expected = naive_plan(routed, rank_);

    EXPECT_EQ(plan.tokens, routed.counts[rank_]);
    EXPECT_EQ(plan.top_k, routed.top_k);
    EXPECT_EQ(plan.send_rows, expected.send_rows);
    EXPECT_EQ(plan.receive_rows, expected.receive_rows);
    EXPECT_EQ(plan.send_assignments, expected.send_assignments);
    EXPECT_EQ(plan.receive_assignments, expected.receive_assignments);
    EXPECT_EQ(plan.expert_counts.on_host(), expected.expert_counts);
    EXPECT_EQ(numbers(plan.send_tokens), expected.send_tokens);
    EXPECT_EQ(numbers(plan.token_offsets), expected.token_offsets);
    EXPECT_EQ(numbers(plan.token_rows), expected.token_rows);
    EXPECT_EQ(numbers(plan.send_order), expected.send_order);
    EXPECT_EQ(numbers(plan.received_order), expected.received_order);
    EXPECT_EQ(numbers(plan.assignment_rows), expected.assignment_rows);
    EXPECT_EQ(numbers(plan.row_offsets), expected.row_offsets);
    EXPECT_EQ(numbers(plan.row_assignments), expected.row_assignments);
    EXPECT_EQ(plan.rows(), static_cast<int64_t>(expected.row_offsets.size()) - 1);
    EXPECT_EQ(plan.assignments(), static_cast<int64_t>(expected.received_order.size()));
  }
}

// A token crosses to a rank once, and no assignment is lost, whatever the plan says of itself.
TEST_F(PlanTest, ConservesAssignmentsOverRanks) {
  const auto routed =
      make_routing_case(random_, world_->size(), 8, 3, 50, Skew::kZipf, Split::kUneven);
  const Exchange exchange(world_, 8);
  const auto plan = exchange.plan(routing_of(routed.local(routed.expert_ids, rank_)));
  auto totals = torch::tensor({plan.assignments()}, torch::kInt64);
  world_->all_reduce(totals);
  EXPECT_EQ(totals.item<int64_t>(), 50 * 3);
  for (const auto rows : plan.send_rows) {
    EXPECT_LE(rows, plan.tokens);
  }
}

TEST_F(PlanTest, AcceptsStridedIds) {
  const auto routed =
      make_routing_case(random_, world_->size(), 8, 2, 30, Skew::kUniform, Split::kUneven);
  const Exchange exchange(world_, 8);
  const auto ids = routed.local(routed.expert_ids, rank_);
  const auto plain = exchange.plan(routing_of(ids));
  const auto strided = exchange.plan(routing_of(ids.t().contiguous().t()));
  EXPECT_TRUE(identical(strided.send_order, plain.send_order));
  EXPECT_TRUE(identical(strided.assignment_rows, plain.assignment_rows));
}

TEST_F(PlanTest, ManyRowsAndExperts) {
  const auto routed =
      make_routing_case(random_, world_->size(), 130, 8, 3000, Skew::kZipf, Split::kUneven);
  const Exchange exchange(world_, 130);
  const auto plan = exchange.plan(routing_of(routed.local(routed.expert_ids, rank_)));
  const auto expected = naive_plan(routed, rank_);
  EXPECT_EQ(numbers(plan.send_order), expected.send_order);
  EXPECT_EQ(numbers(plan.token_rows), expected.token_rows);
  EXPECT_EQ(numbers(plan.received_order), expected.received_order);
  EXPECT_EQ(numbers(plan.row_assignments), expected.row_assignments);
}

// One rank's bad routing: it says what is wrong, the others say who; the next step works.
void expect_refusal_everywhere(Communicator& world, const Exchange& exchange, const Routing& good,
                               const Routing& bad, const std::string& text) {
  const int culprit = world.size() - 1;
  const auto thrown = thrown_by([&] { exchange.plan(world.rank() == culprit ? bad : good); });
  if (world.rank() == culprit) {
    EXPECT_EQ(thrown.kind, Thrown::Kind::kInput) << thrown;
    EXPECT_TRUE(thrown.says(text)) << "expected to read \"" << text << "\" in: " << thrown;
  } else {
    EXPECT_EQ(thrown.kind, Thrown::Kind::kCommunication) << thrown;
    EXPECT_EQ(thrown.peers, std::vector<int>{culprit}) << thrown;
    EXPECT_TRUE(thrown.says(std::to_string(culprit))) << thrown;
  }
  EXPECT_EQ(exchange.plan(good).tokens, good.expert_ids.size(0));
}

TEST_F(PlanTest, RefusesInvalidIdsOnEveryRank) {
  const Exchange exchange(world_, 6);
  const auto good = routing_of(random_expert_ids(random_, 7, 6, 3, Skew::kUniform));
  const auto with = [&](int64_t token, int64_t slot, int64_t value) {
    auto bad = routing_of(good.expert_ids.clone());
    bad.expert_ids[token][slot] = value;
    return bad;
  };
  for (const int64_t value : {int64_t{6}, int64_t{-1}, std::numeric_limits<int64_t>::max(),
                              std::numeric_limits<int64_t>::min(), int64_t{1} << 32}) {
    SCOPED_TRACE(value);
    expect_refusal_everywhere(*world_, exchange, good, with(4, 1, value), "token 4");
  }
  // Twice in a token.
  const auto twice = with(5, 2, good.expert_ids[5][0].item<int64_t>());
  expect_refusal_everywhere(*world_, exchange, good, twice, "token 5");
  // More slots than experts.
  const auto crowded = routing_of(torch::arange(7).expand({2, 7}).contiguous());
  expect_refusal_everywhere(*world_, exchange, good, crowded, "token 0");
}

TEST_F(PlanTest, RefusesAGateThatIsNotFiniteOnEveryRank) {
  const Exchange exchange(world_, 6);
  const auto ids = random_expert_ids(random_, 7, 6, 2, Skew::kUniform);
  auto bad = routing_of(ids);
  bad.first_nonfinite_token = on_device(torch::tensor(3, torch::kInt64));
  expect_refusal_everywhere(*world_, exchange, routing_of(ids), bad, "token 3");
}

TEST_F(PlanTest, RefusesWrongTensorsBeforeCommunication) {
  const Exchange exchange(world_, 4);
  const auto ids = torch::tensor({{0, 1}, {2, 3}});
  const auto before = world_->traffic().collectives;
  EXPECT_INPUT_ERROR(exchange.plan(Routing{}), "expert_ids");
  EXPECT_INPUT_ERROR(exchange.plan(routing_of(ids.to(torch::kInt32))), "Int");
  EXPECT_INPUT_ERROR(exchange.plan(routing_of(ids.reshape({4}))), "[4]");
  EXPECT_INPUT_ERROR(exchange.plan(routing_of(ids.slice(1, 0, 0))), "0");
  auto routing = routing_of(ids);
  routing.weights = on_device(torch::ones({2, 1}));
  EXPECT_INPUT_ERROR(exchange.plan(routing), "weights");
  EXPECT_EQ(world_->traffic().collectives, before);
}

TEST_F(PlanTest, RefusesNoExperts) {
  EXPECT_INPUT_ERROR(Exchange(world_, 0), "0");
  EXPECT_INPUT_ERROR(Exchange(world_, -3), "-3");
}

}  // namespace
}  // namespace anabranch::test
