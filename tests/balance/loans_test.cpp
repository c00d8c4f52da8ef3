// Experts that are lent: whose weights travel to other ranks in the place of their tokens. That a layer of them computes what the dense
// reference does is among the cases of moe_layer_test.
#include <anabranch/error.h>
#include <anabranch/moe_layer.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <future>
#include <set>
#include <stdexcept>
#include <utility>

#include "balance/lane.h"
#include "balance/split_routing.h"
#include "balance/loan_choice.h"
#include "communicator/agreement.h"
#include "support/collectives.h"
#include "support/devices.h"
#include "support/layer_case.h"
#include "support/thrown.h"
#include "support/tolerance.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

/// Random counts of some skew over random blocks.
struct Drawn {
  explicit Drawn(Random& random)
      : placement{random.integer(1, 12), random.integer(1, 6)},
        costs{random.uniform(), random.uniform(), 60 * random.uniform()} {
    const auto favour = torch::exp(random.normal({placement.num_experts}) * random.uniform() * 3);
    counts = (random.uniform({placement.num_ranks, placement.num_experts}) * favour * 50)
                 .to(torch::kLong);
    std::vector<int64_t> owners;
    for (int64_t rank = 0; rank < placement.num_ranks; ++rank) {
      owners.insert(owners.end(), placement.local_experts(rank), rank);
    }
    owner = torch::tensor(owners, torch::kLong);
  }

  ExpertPlacement placement;
  StepCosts costs;
  torch::Tensor counts;  ///< [W, E]
  torch::Tensor owner;   ///< [E]
};

/// By the definition, with whole tensors: `by_rank` [W, E, W] assignments of each source, expert and rank that computes
/// them.
StepForecast forecast_of(const Drawn& drawn, const torch::Tensor& by_rank) {
  const int64_t ranks = drawn.placement.num_ranks;
  const auto own = torch::eye(ranks, torch::kLong).unsqueeze(1);
  const auto crossing = (by_rank * (1 - own)).sum(1);  // [source, rank]
  const auto moved = crossing.sum(1) + crossing.sum(0);
  const auto computed = by_rank.sum(0).sum(0);
  const auto owns = torch::one_hot(drawn.owner, ranks);  // [E, W]
  const auto borrows = (by_rank.sum(0) > 0).to(torch::kLong) * (1 - owns);
  const auto lends = owns * (borrows.sum(1) > 0).unsqueeze(1);
  const auto most = [](const torch::Tensor& of_ranks) {
    return static_cast<double>(of_ranks.max().item<int64_t>());
  };
  return {computed.max().item<int64_t>(),
          most(computed) * drawn.costs.assignment + most(moved) * drawn.costs.row +
              (most(lends.sum(0)) + most(borrows.sum(0))) * drawn.costs.expert};
}

/// [W, E, W] of loans, checked on the way: each share once, by nobody but borrowers, and all of them have some.
torch::Tensor by_rank(const Drawn& drawn, const std::vector<Loan>& loans) {
  const int64_t ranks = drawn.placement.num_ranks;
  auto result = drawn.counts.unsqueeze(2) * torch::one_hot(drawn.owner, ranks).unsqueeze(0);
  int64_t last = -1;
  for (const Loan& loan : loans) {
    EXPECT_GT(loan.expert, last);  // in blocks a place is an expert
    last = loan.expert;
    EXPECT_EQ(loan.owner, drawn.owner[loan.expert].item<int64_t>());
    std::set<int64_t> borrowers;
    std::set<std::pair<int64_t, int64_t>> shares;
    for (const auto& [source, borrower, assignments] : loan.shares) {
      EXPECT_GT(assignments, 0);
      EXPECT_NE(borrower, loan.owner);
      EXPECT_TRUE(shares.insert({source, borrower}).second);
      borrowers.insert(borrower);
      result[source][loan.expert][loan.owner] -= assignments;
      result[source][loan.expert][borrower] += assignments;
    }
    EXPECT_EQ(loan.borrowers, std::vector<int64_t>(borrowers.begin(), borrowers.end()));
    for (int64_t source = 0; source < ranks; ++source) {
      EXPECT_EQ(loan.left[source], result[source][loan.expert][loan.owner].item<int64_t>());
    }
  }
  EXPECT_GE(result.min().item<int64_t>(), 0);
  EXPECT_TRUE(result.sum(2).equal(drawn.counts));
  return result;
}

void expect_same(const StepForecast& found, const StepForecast& wanted) {
  EXPECT_EQ(found.fullest_rank, wanted.fullest_rank);
  EXPECT_NEAR(found.seconds, wanted.seconds, 1e-9 * (1 + wanted.seconds));
}

TEST(LoanChoice, OfShadowsIsTheBestBeginningOfExpertsByFallingLoad) {
  Random random(test_seed());
  for (int64_t i = effort(200); i > 0; --i) {
    const Drawn drawn(random);
    const auto& counts = drawn.counts;
    SCOPED_TRACE(c10::str("counts ", counts));
    const int64_t ranks = drawn.placement.num_ranks;
    const auto at_owner = torch::one_hot(drawn.owner, ranks).unsqueeze(0);
    const auto at_home = torch::eye(ranks, torch::kLong).unsqueeze(1);
    auto now = counts.unsqueeze(2) * at_owner;
    const StepForecast without = forecast_of(drawn, now);
    StepForecast best = without;
    for (const auto& expert :
         counts.sum(0).argsort(/*stable=*/true, /*dim=*/0, /*descending=*/true).unbind()) {
      now.index_copy_(1, expert.view({1}),
                      (counts.unsqueeze(2) * at_home).index_select(1, expert.view({1})));
      const StepForecast forecast = forecast_of(drawn, now);
      if (forecast.seconds < best.seconds) best = forecast;
    }
    if (best.seconds > 0.95 * without.seconds) best = without;
    const auto choice = choose_shadows(counts, drawn.placement, drawn.costs);
    expect_same(choice.without, without);
    expect_same(choice.with, best);
    expect_same(forecast_of(drawn, by_rank(drawn, choice.loans)), best);
    for (const Loan& loan : choice.loans) {
      for (const Share& share : loan.shares) EXPECT_EQ(share.source, share.borrower);
    }
  }
}

TEST(LoanChoice, OfReplicasEvensTheRanks) {
  Random random(test_seed());
  for (int64_t i = effort(200); i > 0; --i) {
    const Drawn drawn(random);
    SCOPED_TRACE(c10::str("counts ", drawn.counts));
    const auto choice = choose_replicas(drawn.counts, drawn.placement, drawn.costs);
    const auto shares = by_rank(drawn, choice.loans);
    expect_same(forecast_of(drawn, shares), choice.with);
    const double mean = static_cast<double>(drawn.counts.sum().item<int64_t>()) /
                        static_cast<double>(drawn.placement.num_ranks);
    // Ranks are brought to the mean rounded down, and what is left is less than one a rank.
    EXPECT_LE(static_cast<double>(choice.with.fullest_rank),
              std::max(1.05 * mean,
                       std::floor(mean) + static_cast<double>(drawn.placement.num_ranks - 1)));
    EXPECT_LE(choice.with.fullest_rank, choice.without.fullest_rank);
    EXPECT_LE(static_cast<int64_t>(choice.loans.size()),
              drawn.placement.num_ranks + drawn.placement.num_experts);
  }
}

TEST(LoanChoice, OfGatheredExpertsLeavesTokensInTheirGroup) {
  Random random(test_seed());
  for (int64_t i = effort(100); i > 0; --i) {
    const Drawn drawn(random);
    const int64_t ranks = drawn.placement.num_ranks;
    for (int64_t group = 1; group <= ranks; ++group) {
      if (ranks % group != 0) continue;
      SCOPED_TRACE(c10::str("groups of ", group, " counts ", drawn.counts));
      const auto choice = choose_gathered(drawn.counts, drawn.placement, drawn.costs, group);
      const auto shares = by_rank(drawn, choice.loans);
      expect_same(forecast_of(drawn, shares), choice.with);
      for (const auto& found : shares.nonzero().unbind()) {
        const auto source = found[0].item<int64_t>();
        const auto owner = drawn.owner[found[1]].item<int64_t>();
        const auto rank = found[2].item<int64_t>();
        EXPECT_EQ(rank / group, owner / group);
        EXPECT_EQ(rank % group, source % group);
      }
    }
  }
}

TEST(LoanChoice, IsTheCheapest) {
  Random random(test_seed());
  int64_t replicas = 0;
  for (int64_t i = effort(200); i > 0; --i) {
    const Drawn drawn(random);
    SCOPED_TRACE(c10::str("counts ", drawn.counts));
    const auto choice = choose_cheapest(drawn.counts, drawn.placement, drawn.costs);
    expect_same(forecast_of(drawn, by_rank(drawn, choice.loans)), choice.with);
    const double shadows = choose_shadows(drawn.counts, drawn.placement, drawn.costs).with.seconds;
    const double all = choose_replicas(drawn.counts, drawn.placement, drawn.costs).with.seconds;
    EXPECT_LE(choice.with.seconds, shadows);
    const double without = choice.without.seconds;
    EXPECT_LE(choice.with.seconds, all <= 0.95 * without ? all : without);
    const int64_t ranks = drawn.placement.num_ranks;
    const double gathered =
        choose_gathered(drawn.counts, drawn.placement, drawn.costs, ranks).with.seconds;
    EXPECT_LE(choice.with.seconds, gathered <= 0.95 * without ? gathered : without);
    EXPECT_LE(choice.with.seconds, (choice.loans.empty() ? 1 : 0.95) * without);
    replicas += choice.with.seconds < shadows ? 1 : 0;
  }
  EXPECT_GT(replicas, 0);
}

MoEOptions small_options() {
  MoEOptions options;
  options.hidden_size = options.expert_hidden_size = 4;
  options.num_experts = 5;
  options.top_k = 1;
  options.renormalize = false;
  options.bias = options.glu = true;
  options.balance = "shadow";
  options.engine = "deterministic";  // tells other ranks no choices
  options.device = device();
  return options;
}

/// Of all ranks: enough for rows to weigh more than an expert that goes to each of them.
int64_t all_tokens() { return 100 * world()->size(); }

LayerCase one_takes_all(Random& random) {
  MoEOptions options = small_options();
  options.balance = "off";
  return draw_layer_case(random, world()->size(), options, all_tokens(), Skew::kOneExpert,
                         Split::kEven,
                         /*routing_from_outside=*/true);
}

TEST(Loans, AreThoseOfTheFullestExpertsAndAlikeOnAllRanks) {
  ANABRANCH_NEEDS_RANKS(2);
  Random random(test_seed());
  auto layer_case = one_takes_all(random);
  for (const char* balance : {"shadow", "replicas"}) {
    layer_case.options.balance = balance;
    auto layer = make_layer(layer_case, world());
    EXPECT_THAT(layer->explain(), ::testing::HasSubstr("no step yet"));
    run_step(layer, layer_case, layer_case.counts, world()->rank());
    EXPECT_THAT(layer->explain(), ::testing::HasSubstr("weights of experts travel"));
    EXPECT_THAT(layer->explain(), ::testing::HasSubstr("as assumed"));
    const auto texts = all_gather_strings(*world(), layer->explain());
    EXPECT_THAT(texts, ::testing::Each(texts.front()));
  }
  layer_case.options.balance = "auto";
  auto measured = make_layer(layer_case, world());
  run_step(measured, layer_case, layer_case.counts, world()->rank());
  EXPECT_THAT(measured->explain(), ::testing::HasSubstr("as measured"));
}

/// What travels is the expert, once there and once back, and no row.
TEST(Loans, OfShadowsSpareTheRowsTheirWay) {
  ANABRANCH_NEEDS_RANKS(2);
  Random random(test_seed());
  auto layer_case = one_takes_all(random);
  const auto bytes_of = [&](const std::string& balance) {
    layer_case.options.balance = balance;
    auto layer = make_layer(layer_case, world());
    world()->reset_traffic();
    run_step(layer, layer_case, layer_case.counts, world()->rank());
    auto bytes = torch::tensor(world()->traffic().bytes_sent);
    world()->all_reduce(bytes);
    return bytes.item<int64_t>();
  };
  EXPECT_LT(bytes_of("shadow"), bytes_of("off") / 2);
}

/// By another group's calls than those of the rows, which do not wait for them.
TEST(Loans, TravelBesideOtherCalls) {
  ANABRANCH_NEEDS_RANKS(2);
  if (!device().is_cpu() || world()->split_order(device()) != SplitOrder::kAny) {
    GTEST_SKIP() << "they travel in turn";
  }
  Lane lane(*world());
  std::promise<void> called;
  auto sum = torch::ones({1});
  const auto travel = lane.run([&, when = called.get_future().share()] {
    when.wait();
    lane.communicator().all_reduce(sum);
  });
  world()->barrier();
  called.set_value();
  travel.get();
  EXPECT_EQ(sum.item<int64_t>(), world()->size());
  EXPECT_THROW(lane.run([] { throw std::runtime_error("a peer"); }).get(), std::runtime_error);

  Random random(test_seed());
  auto layer_case = one_takes_all(random);
  layer_case.options.balance = "replicas";
  const auto bytes_of = [&](const std::string& overlap) {
    layer_case.options.overlap = overlap;
    auto layer = make_layer(layer_case, world());
    world()->reset_traffic();
    run_step(layer, layer_case, layer_case.counts, world()->rank());
    return sum_over_ranks(*world(), static_cast<double>(world()->traffic().bytes_sent));
  };
  const double expert = 4 * (3 * 4 * 4 + 2 * 4 + 4);  // that goes once there and back, at least
  EXPECT_GE(bytes_of("off") - bytes_of("1"), expert);
}

/// With all experts gathered no row travels, and with balanced load neither is anything computed elsewhere.
TEST(Loans, OfAllExpertsLeaveNoRowToTravel) {
  ANABRANCH_NEEDS_RANKS(2);
  Random random(test_seed());
  MoEOptions options = small_options();
  options.balance = "gather";
  const auto layer_case =
      draw_layer_case(random, world()->size(), options, all_tokens(), Skew::kUniform,
                      Split::kUneven, /*routing_from_outside=*/false);
  auto layer = make_layer(layer_case, world());
  run_step(layer, layer_case, layer_case.counts, world()->rank());
  const auto text = layer->explain();
  const auto most = *std::max_element(layer_case.counts.begin(), layer_case.counts.end());
  EXPECT_THAT(text, ::testing::HasSubstr(c10::str("computes ", most, " assignments and not")));
}

/// Assignments that each rank's places get, of owners and of borrowers, are those that were planned, and even.
TEST(Loans, OfReplicasBringEachRankItsShare) {
  Random random(test_seed());
  const int ranks = world()->size();
  for (int64_t i = effort(10); i > 0; --i) {
    const ExpertPlacement placement{random.integer(1, 2 * ranks), ranks};
    const Exchange exchange(world(), placement);
    const int64_t experts = placement.num_experts;
    const int64_t top_k = random.integer(1, std::min<int64_t>(experts, 3));
    const auto favour = random.normal({experts}) * 3;
    const int64_t tokens = random.chance(0.3) && world()->rank() == 0 ? 0 : 100;
    Random own(random.next() + world()->rank());
    const auto scores = favour + own.normal({tokens, experts});
    const auto ids =
        std::get<1>(scores.topk(top_k, 1)).masked_fill(own.uniform({tokens, top_k}) < 0.1, -1);
    Routing routing;
    routing.expert_ids = on_device(ids);
    routing.weights = on_device(torch::ones({tokens, top_k}));
    const auto count = [](const torch::Tensor& of, int64_t most) {
      return torch::bincount(of.cpu().masked_select(of.cpu() >= 0), {}, most);
    };
    const auto counts = world()->all_gather(on_device(count(ids, experts))).cpu();
    const auto choice = choose_replicas(counts, placement, {});
    if (choice.loans.empty()) continue;
    const auto [owned, lent, borrowers] = split_routing(routing, choice.loans, exchange);
    const auto in_one = on_device(ids) >= 0;
    EXPECT_TRUE((owned.expert_ids >= 0).logical_xor(lent.expert_ids >= 0).equal(in_one));
    EXPECT_TRUE(owned.expert_ids.equal(routing.expert_ids.masked_fill(lent.expert_ids >= 0, -1)));
    int64_t computed = exchange.plan(owned).assignments();
    if (borrowers.has_value()) {
      const auto plan = borrowers->plan(lent);
      computed += plan.assignments();
      const auto loan_counts = plan.expert_counts.on_host();
      size_t next = 0;
      for (const Loan& loan : choice.loans) {
        int64_t wanted = 0;
        for (const Share& share : loan.shares) {
          wanted += share.borrower == world()->rank() ? share.assignments : 0;
        }
        if (wanted == 0) continue;
        EXPECT_EQ(loan_counts.at(next++), wanted);
      }
      EXPECT_EQ(next, loan_counts.size());
    }
    const auto all = world()->all_gather(on_device(torch::tensor(computed, torch::kLong)));
    EXPECT_EQ(all.max().item<int64_t>(), choice.with.fullest_rank);
    EXPECT_EQ(all.sum().item<int64_t>(), counts.sum().item<int64_t>());
  }
}

TEST(Loans, AddTheirGradientsToMainGradients) {
  Random random(test_seed());
  auto layer_case = one_takes_all(random);
  const auto run = [&](const std::string& balance) {
    layer_case.options.balance = balance;
    auto layer = make_layer(layer_case, world());
    auto experts = layer->experts();
    experts->main_grad = {torch::zeros_like(experts->up_weight).detach(),
                          torch::zeros_like(experts->down_weight).detach()};
    run_step(layer, layer_case, layer_case.counts, world()->rank());
    EXPECT_FALSE(experts->up_weight.grad().defined());
    return experts->main_grad;
  };
  const WeightSums without = run("off");
  const auto limit = [&](const torch::Tensor& sum) {
    return tolerance_of_stages(torch::kFloat32, 4 * all_tokens(), 1 + max_abs(sum), 16);
  };
  for (const char* balance : {"shadow", "replicas"}) {
    const WeightSums with = run(balance);
    EXPECT_TRUE(close(with.up, without.up, limit(without.up)));
    EXPECT_TRUE(close(with.down, without.down, limit(without.down)));
  }
}

TEST(Loans, HaveTheSameBitsInEveryRun) {
  Random random(test_seed());
  auto layer_case = one_takes_all(random);
  for (const char* balance : {"shadow", "replicas", "gather"}) {
    layer_case.options.balance = balance;
    const auto run = [&] {
      auto layer = make_layer(layer_case, world());
      const Step step = run_step(layer, layer_case, layer_case.counts, world()->rank());
      std::vector<torch::Tensor> found = {step.output.output.detach(), step.x.grad(),
                                          step.weights.grad()};
      for (const auto& parameter : layer->experts()->parameters()) {
        found.push_back(parameter.grad());
      }
      return found;
    };
    const auto first = run();
    const auto second = run();
    for (size_t i = 0; i < first.size(); ++i) EXPECT_TRUE(identical(first[i], second[i]));
  }
}

/// Of an expert that is lent the weight that is not trained gets no gradient, and the other one its own.
TEST(Loans, LeaveWhatIsNotTrained) {
  Random random(test_seed());
  auto layer_case = one_takes_all(random);
  layer_case.options.balance = "replicas";
  auto all = make_layer(layer_case, world());
  run_step(all, layer_case, layer_case.counts, world()->rank());
  auto some = make_layer(layer_case, world());
  some->experts()->down_weight.set_requires_grad(false);
  run_step(some, layer_case, layer_case.counts, world()->rank());
  EXPECT_FALSE(some->experts()->down_weight.grad().defined());
  EXPECT_TRUE(identical(some->experts()->up_weight.grad(), all->experts()->up_weight.grad()));
}

TEST(Loans, AreRefusedWhereTheOptionIsNone) {
  auto options = small_options();
  for (const char* balance : {"on", "gather:", "gather:0", "gather:-1", "gather:2x", "gather2"}) {
    options.balance = balance;
    EXPECT_INPUT_ERROR(MoELayer(options, world()), "expected off, shadow");
  }
  options.balance = c10::str("gather:", world()->size() + 1);
  if (world()->size() > 1) {
    EXPECT_INPUT_ERROR(MoELayer(options, world()), "that divides them");
  }
}

}  // namespace
}  // namespace anabranch::test
