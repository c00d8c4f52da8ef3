#include <limits>
#include <set>

#include "kernels/kernels_fixture.h"
#include "support/random_routing.h"

namespace anabranch::test {
namespace {

class PlanKernelsTest : public KernelsTest {};
ANABRANCH_FOR_EACH_DEVICE(PlanKernelsTest);

// Blocks of experts, possibly empty: [W+1].
std::vector<int64_t> random_blocks(Random& random, int64_t num_experts, int64_t ranks) {
  std::vector<int64_t> first = {0, num_experts};
  for (int64_t r = 1; r < ranks; ++r) {
    first.push_back(random.integer(0, num_experts));
  }
  std::sort(first.begin(), first.end());
  return first;
}

TEST_P(PlanKernelsTest, PlanSendEqualsTheDefinition) {
  for (int64_t i = 0; i < effort(60); ++i) {
    const auto num_experts = random_.pick<int64_t>({1, 2, 5, 16, 70, 300});
    const auto top_k = random_.integer(1, std::min<int64_t>(num_experts, 10));
    const auto tokens = random_.pick<int64_t>({0, 1, 3, 40, 1000});
    const auto ranks = random_.integer(1, 9);
    const auto first = random_blocks(random_, num_experts, ranks);
    auto ids = random_expert_ids(random_, tokens, num_experts, top_k, random_.pick(all_skews()));
    const bool may_skip = random_.chance(0.3);
    if (may_skip) {
      ids = ids.masked_fill(random_.uniform(ids.sizes()) < random_.uniform(), -1);
    }
    SCOPED_TRACE(c10::str("T ", tokens, " k ", top_k, " blocks ", c10::Join(",", first),
                          may_skip ? " with none" : ""));
    const auto plan = plan_.plan_send(on_device(ids), first, may_skip);

    const auto flat = numbers(ids);
    std::vector<int64_t> rank_rows, send_tokens, token_offsets, token_rows, send_order, row_in_rank;
    std::vector<std::vector<int64_t>> rows_of_token(tokens);
    std::vector<std::vector<int64_t>> row_within(ranks, std::vector<int64_t>(tokens, -1));
    for (int64_t r = 0; r < ranks; ++r) {
      rank_rows.push_back(0);
      for (int64_t t = 0; t < tokens; ++t) {
        const bool goes = std::any_of(flat.begin() + t * top_k, flat.begin() + (t + 1) * top_k,
                                      [&](int64_t e) { return e >= first[r] && e < first[r + 1]; });
        if (goes || ranks == 1) {  // one rank has every token as a row
          rows_of_token[t].push_back(static_cast<int64_t>(send_tokens.size()));
          send_tokens.push_back(t);
          row_within[r][t] = rank_rows.back()++;
        }
      }
    }
    token_offsets.push_back(0);
    for (const auto& rows : rows_of_token) {
      token_rows.insert(token_rows.end(), rows.begin(), rows.end());
      token_offsets.push_back(static_cast<int64_t>(token_rows.size()));
    }
    std::vector<int64_t> expert_counts(num_experts, 0);
    for (int64_t e = 0; e < num_experts; ++e) {
      const auto owner = std::upper_bound(first.begin(), first.end(), e) - first.begin() - 1;
      for (int64_t j = 0; j < tokens * top_k; ++j) {
        if (flat[j] == e) {
          send_order.push_back(j);
          row_in_rank.push_back(row_within[owner][j / top_k]);
          ++expert_counts[e];
        }
      }
    }
    const auto sent = static_cast<int64_t>(send_tokens.size());
    const auto assignments = static_cast<int64_t>(send_order.size());
    EXPECT_EQ(numbers(plan.expert_counts.narrow(0, 0, num_experts)), expert_counts);
    EXPECT_EQ(numbers(plan.rank_rows), rank_rows);
    EXPECT_EQ(numbers(plan.send_tokens.narrow(0, 0, sent)), send_tokens);
    EXPECT_EQ(numbers(plan.token_offsets), token_offsets);
    EXPECT_EQ(numbers(plan.token_rows.narrow(0, 0, sent)), token_rows);
    EXPECT_EQ(plan.send_order.size(0), tokens * top_k);
    EXPECT_EQ(numbers(plan.send_order.narrow(0, 0, assignments)), send_order);
    EXPECT_EQ(plan.segment_rows.scalar_type(), torch::kInt32);
    EXPECT_EQ(numbers(plan.segment_rows.narrow(0, 0, assignments)), row_in_rank);
  }
}

TEST_P(PlanKernelsTest, PlanLocalEqualsTheDefinition) {
  for (int64_t i = 0; i < effort(60); ++i) {
    const auto num_experts = random_.pick<int64_t>({1, 2, 5, 16, 70, 300, 1500});
    const auto top_k = random_.integer(1, std::min<int64_t>(num_experts, 40));
    const auto tokens = random_.pick<int64_t>({0, 1, 3, 40, 1000});
    const auto ids =
        random_expert_ids(random_, tokens, num_experts, top_k, random_.pick(all_skews()));
    SCOPED_TRACE(c10::str("T ", tokens, " k ", top_k, " E ", num_experts));
    const auto weights = random_.normal(ids.sizes())
                             .to(random_.pick<torch::Dtype>({torch::kFloat32, torch::kFloat64}));
    const auto plan = plan_.plan_local(on_device(ids), on_device(weights), num_experts);

    const auto flat = numbers(ids);
    std::vector<int64_t> counts, order, rows, members;
    std::vector<std::vector<int64_t>> places_of(tokens);
    for (int64_t e = 0; e < num_experts; ++e) {
      counts.push_back(0);
      for (int64_t j = 0; j < tokens * top_k; ++j) {
        if (flat[j] == e) {
          ++counts.back();
          places_of[j / top_k].push_back(static_cast<int64_t>(order.size()));
          order.push_back(j);
          rows.push_back(j / top_k);
        }
      }
    }
    for (const auto& places : places_of) {
      members.insert(members.end(), places.begin(), places.end());
    }
    EXPECT_EQ(numbers(plan.expert_counts), counts);
    EXPECT_EQ(numbers(plan.send_order), order);
    EXPECT_EQ(numbers(plan.assignment_rows), rows);
    EXPECT_EQ(numbers(plan.by_row.offsets), numbers(top_k * torch::arange(tokens + 1)));
    EXPECT_EQ(numbers(plan.by_row.members), members);
    EXPECT_TRUE(identical(plan.weights.cpu(),
                          weights.flatten().index_select(0, torch::tensor(order, torch::kInt64))));
    EXPECT_FALSE(plan_.plan_local(on_device(ids), {}, num_experts).weights.defined());
    EXPECT_EQ(numbers(plan.places), numbers(torch::arange(std::max(tokens + 1, tokens * top_k))));
  }
}

TEST_P(PlanKernelsTest, PlanLocalOfInvalidIdsStaysInItsTensors) {
  const auto ids = torch::tensor({{-7, 3, 3}, {9, 9, 0}, {1, 1 << 30, 2}}, torch::kInt64);
  const auto plan = plan_.plan_local(on_device(ids), {}, 4);
  for (const auto& permutation : {plan.send_order, plan.by_row.members}) {
    EXPECT_EQ(numbers(std::get<0>(permutation.sort())), numbers(torch::arange(9)));
  }
  EXPECT_EQ(plan.expert_counts.sum().item<int64_t>(), 9);
}

TEST_P(PlanKernelsTest, OrderArrivalsBringsExpertsTogether) {
  for (int64_t i = 0; i < effort(40); ++i) {
    const auto ranks = random_.integer(1, 6);
    const auto experts = random_.integer(0, 9);
    auto counts = (random_.uniform({ranks, experts}) * random_.pick<double>({1, 3, 40}))
                      .floor()
                      .to(torch::kInt64);
    auto rows = (random_.uniform({ranks}) * 50).floor().to(torch::kInt64) + 1;
    const auto total = counts.sum().item<int64_t>();
    const auto count = counts.accessor<int64_t, 2>();
    // Arrivals by (source, expert), each with a row of its source's segment.
    std::vector<int64_t> segment_rows;
    std::vector<std::pair<int64_t, int64_t>> source_and_expert;
    for (int64_t r = 0; r < ranks; ++r) {
      for (int64_t e = 0; e < experts; ++e) {
        for (int64_t j = 0; j < count[r][e]; ++j) {
          segment_rows.push_back(random_.integer(0, rows[r].item<int64_t>() - 1));
          source_and_expert.emplace_back(r, e);
        }
      }
    }
    std::vector<int64_t> received_order, assignment_rows;
    for (int64_t e = 0; e < experts; ++e) {
      for (int64_t j = 0; j < total; ++j) {
        const auto [source, expert] = source_and_expert[j];
        if (expert == e) {
          received_order.push_back(j);
          assignment_rows.push_back(rows.slice(0, 0, source).sum().item<int64_t>() +
                                    segment_rows[j]);
        }
      }
    }
    const auto order = plan_.order_arrivals(on_device(torch::tensor(segment_rows, torch::kInt32)),
                                            ArrivalEnds::of(on_device(rows), on_device(counts)));
    EXPECT_EQ(numbers(order.received_order), received_order) << counts;
    EXPECT_EQ(numbers(order.assignment_rows), assignment_rows) << counts;
    // The same with room for more.
    const auto none = random_.integer(1000, 2000);
    for (int64_t room = random_.integer(1, 5); room > 0; --room) {
      received_order.push_back(static_cast<int64_t>(received_order.size()));
      assignment_rows.push_back(none);
      segment_rows.push_back(-1);
    }
    const auto within =
        plan_.order_arrivals(on_device(torch::tensor(segment_rows, torch::kInt32)),
                             ArrivalEnds::of(on_device(rows), on_device(counts)), none);
    EXPECT_EQ(numbers(within.received_order), received_order) << counts;
    EXPECT_EQ(numbers(within.assignment_rows), assignment_rows) << counts;
  }
}

// Of what ranks have told, in which one thing may be wrong, each rank's verdict by the definition.
TEST_P(PlanKernelsTest, JudgeEqualsTheDefinition) {
  for (int64_t i = 0; i < effort(80); ++i) {
    const auto ranks = random_.integer(1, 8);
    const auto experts = random_.pick<int64_t>({1, 3, 40, 300});
    const auto first = random_blocks(random_, experts, ranks);
    const auto begins = torch::tensor(first, torch::kInt64);
    const auto drawn = [&](int64_t columns, double most) {
      return (random_.uniform({ranks, columns}) * most).floor().to(torch::kInt64);
    };
    auto head = torch::tensor({-1, -1, 7, 0, 0}, torch::kInt64).repeat({ranks, 1});
    const auto rows = drawn(ranks, 30);
    const auto counts = drawn(experts, random_.pick<double>({1, 3, 40}));
    const auto sums = torch::zeros({ranks, ranks}, torch::kInt64);  // by source and target
    for (int64_t target = 0; target < ranks; ++target) {
      sums.select(1, target).copy_(counts.slice(1, first[target], first[target + 1]).sum(1));
    }
    head.select(1, kToldRoomRows).copy_(rows.sum(0) + random_.integer(0, 2));
    head.select(1, kToldRoomAssignments).copy_(sums.sum(0) + random_.integer(0, 2));
    auto told = torch::cat({head, rows, counts}, 1);
    const auto culprit = random_.integer(0, ranks - 1);
    const auto wrong = random_.integer(0, 6);  // 6: nothing
    const std::vector<int64_t> values = {17,
                                         23,
                                         8,
                                         rows.sum(0)[culprit].item<int64_t>() - 1,
                                         sums.sum(0)[culprit].item<int64_t>() - 1,
                                         int64_t{1} << 40};
    if (wrong < 6) {
      told[culprit][wrong] = values[wrong];
    }
    const bool refuses = wrong < 2 || (wrong == kToldForm && ranks > 1);
    const bool exceeded = wrong == kToldRoomRows || wrong == kToldRoomAssignments ||
                          (wrong == 5);  // so many rows fit nowhere
    const bool spoilt = refuses || exceeded;
    SCOPED_TRACE(c10::str("W ", ranks, " E ", experts, " blocks ", c10::Join(",", first), " wrong ",
                          wrong, " of ", culprit));
    for (int64_t rank = 0; rank < ranks; ++rank) {
      const int64_t local = first[rank + 1] - first[rank];
      const auto told_to_host = torch::full({4}, -1, torch::kInt64);
      const auto mailbox = GetParam().is_cuda() ? told_to_host.pin_memory() : told_to_host;
      const auto verdict = plan_.judge(on_device(told), on_device(begins), rank, local, mailbox);
      EXPECT_EQ(verdict.spoilt.item<int64_t>(), spoilt ? 1 : 0);  // and waits for the mailbox
      // Of a form that is not rank 0's all others are to blame, if it is rank 0 that has another.
      const int64_t refusing = wrong == kToldForm && culprit == 0 ? 1 : culprit;
      EXPECT_EQ(numbers(mailbox),
                (std::vector<int64_t>{wrong == 0 && rank == culprit ? 17 : -1,
                                      wrong == 1 && rank == culprit ? 23 : -1,
                                      refuses ? refusing : -1, exceeded ? 1 : -1}));
      const int64_t goes_on = spoilt ? 0 : 1;
      const auto expect_counts = [&](const torch::Tensor& found, const torch::Tensor& by_source) {
        const auto to = by_source[rank] * goes_on;
        EXPECT_EQ(numbers(found),
                  numbers(torch::stack({to, by_source.select(1, rank) * goes_on, to})));
      };
      expect_counts(verdict.row_counts, rows);
      expect_counts(verdict.assignment_counts, sums);
      const auto own = counts.slice(1, first[rank], first[rank + 1]) * goes_on;
      const auto of_experts = own.sum(0);
      EXPECT_EQ(numbers(verdict.counts.first_row),
                numbers(torch::cat({torch::zeros({1}, torch::kInt64), of_experts.cumsum(0)})));
      EXPECT_EQ(numbers(verdict.counts.longest_first),
                numbers(std::get<1>(of_experts.sort(/*stable=*/true, 0, /*descending=*/true))));
      EXPECT_EQ(numbers(verdict.ends.by_source), numbers(own.flatten().cumsum(0)));
      EXPECT_EQ(numbers(verdict.ends.by_expert), numbers(own.t().flatten().cumsum(0)));
      EXPECT_EQ(numbers(verdict.ends.rows), numbers((rows.select(1, rank) * goes_on).cumsum(0)));
    }
  }
}

TEST_P(PlanKernelsTest, GroupListsMembersInOrder) {
  for (const int64_t size : {0, 1, 7, 1000, 5000}) {
    for (const int64_t groups : {1, 2, 33, 4000}) {
      const auto group_of =
          (random_.uniform({size}) * static_cast<double>(groups)).floor().to(torch::kInt64);
      const auto csr = plan_.group(on_device(group_of), groups);
      EXPECT_EQ(numbers(csr.members),
                numbers(std::get<1>(group_of.sort(/*stable=*/true, 0, false))));
      const auto counts = group_of.bincount({}, groups);
      EXPECT_EQ(numbers(csr.offsets),
                numbers(torch::cat({torch::zeros({1}, torch::kInt64), counts.cumsum(0)})));
    }
  }
}

TEST_P(PlanKernelsTest, GroupWithoutGroups) {
  const auto csr = plan_.group(on_device(torch::empty({0}, torch::kInt64)), 0);
  EXPECT_EQ(numbers(csr.offsets), std::vector<int64_t>{0});
}

TEST_P(PlanKernelsTest, FindsTheFirstInvalidToken) {
  const auto first_invalid = [&](const torch::Tensor& ids, bool may_skip = false) {
    const auto weights = torch::ones(ids.sizes());
    const auto check = plan_.check_routing(on_device(ids), on_device(weights), 20, may_skip);
    EXPECT_EQ(check.first_nonfinite_token.item<int64_t>(), -1);
    const auto token = check.first_invalid_token.item<int64_t>();
    // What is refused is NaN, the rest as it was.
    for (int64_t t = 0; t < ids.size(0); ++t) {
      const auto row = check.weights[t].cpu();
      EXPECT_TRUE(row.isnan().all().item<bool>() || row.equal(weights[t])) << t;
    }
    EXPECT_EQ(check.weights.isnan().any().item<bool>(), token >= 0);
    if (token >= 0) {
      EXPECT_TRUE(check.weights[token].isnan().all().item<bool>());
      EXPECT_FALSE(check.weights.slice(0, 0, token).isnan().any().item<bool>());
    }
    return token;
  };
  const auto good = random_expert_ids(random_, 600, 20, 4, Skew::kUniform);
  EXPECT_EQ(first_invalid(good), -1);
  EXPECT_EQ(first_invalid(torch::empty({0, 4}, torch::kInt64)), -1);
  for (const int64_t value : {int64_t{20}, int64_t{-1}, std::numeric_limits<int64_t>::min(),
                              std::numeric_limits<int64_t>::max(), (int64_t{1} << 32) + 1}) {
    auto bad = good.clone();
    bad[599][3] = value;
    EXPECT_EQ(first_invalid(bad), 599) << value;
    bad[17][0] = value;
    EXPECT_EQ(first_invalid(bad), 17) << value;
  }
  auto none = good.clone();
  none[599].fill_(-1);
  none[17][0] = -1;
  EXPECT_EQ(first_invalid(none, /*may_skip=*/true), -1);
  EXPECT_EQ(first_invalid(none), 17);
  none[44][1] = -2;
  EXPECT_EQ(first_invalid(none, /*may_skip=*/true), 44);
  auto twice = good.clone();
  twice[42][3] = twice[42][1];
  EXPECT_EQ(first_invalid(twice), 42);
}

TEST_P(PlanKernelsTest, FindsTheFirstWeightThatIsNotFinite) {
  const auto ids = random_expert_ids(random_, 600, 20, 4, Skew::kUniform);
  for (const auto dtype : {torch::kFloat32, torch::kFloat64}) {
    auto weights = torch::rand({600, 4}, dtype);
    const auto first_nonfinite = [&](const torch::Tensor& of_ids, bool may_skip = false) {
      const auto check = plan_.check_routing(on_device(of_ids), on_device(weights), 20, may_skip);
      EXPECT_EQ(check.first_invalid_token.item<int64_t>(), -1);
      return check.first_nonfinite_token.item<int64_t>();
    };
    EXPECT_EQ(first_nonfinite(ids), -1);
    weights[599][3] = std::numeric_limits<double>::quiet_NaN();
    EXPECT_EQ(first_nonfinite(ids), 599);
    weights[17][0] = -std::numeric_limits<double>::infinity();
    EXPECT_EQ(first_nonfinite(ids), 17);
    auto none = ids.clone();  // the weight of no assignment may be anything
    none[17][0] = -1;
    EXPECT_EQ(first_nonfinite(none, /*may_skip=*/true), 599);
  }
}

}  // namespace
}  // namespace anabranch::test
