// Rows that travel beside the products: the same bits as in turn, and the same bytes on the way.
#include <anabranch/error.h>
#include <anabranch/hierarchical.h>
#include <anabranch/moe_layer.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <thread>

#include "exchange/chunks.h"
#include "overlap_choice.h"
#include "support/devices.h"
#include "support/layer_case.h"
#include "support/thrown.h"
#include "support/tolerance.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

const std::vector<std::string> kDegrees = {"1", "2", "4", "8"};

/// All that a step leaves on this rank, by name.
NamedTensors results_of(MoELayer& layer, const Step& step) {
  NamedTensors results = {{"output", step.output.output}, {"dx", step.x.grad()}};
  if (step.weights.defined()) {
    results["dweights"] = step.weights.grad();
  }
  for (const auto& parameter : layer->named_parameters()) {
    if (parameter.value().grad().defined()) {
      results[parameter.key()] = parameter.value().grad();
    }
  }
  return results;
}

void expect_the_same(const NamedTensors& actual, const NamedTensors& expected) {
  ASSERT_EQ(actual.size(), expected.size());
  for (const auto& [name, tensor] : expected) {
    EXPECT_TRUE(identical(actual.at(name), tensor)) << name;
  }
}

NamedTensors run_case(LayerCase layer_case, const std::string& overlap,
                      const std::shared_ptr<Communicator>& communicator) {
  layer_case.options.overlap = overlap;
  // Every expert by itself: others may add in another order beside other experts.
  if (device().is_cuda()) {
    layer_case.options.engine = "cublas_loop_1";
  }
  auto layer = make_layer(layer_case, communicator);
  const auto step = run_step(layer, layer_case, layer_case.counts, communicator->rank());
  return results_of(layer, step);
}

void expect_the_same_at_all_degrees(const LayerCase& layer_case,
                                    const std::shared_ptr<Communicator>& communicator) {
  SCOPED_TRACE(layer_case.describe());
  const auto expected = run_case(layer_case, "off", communicator);
  for (const auto& degree : kDegrees) {
    SCOPED_TRACE(degree);
    expect_the_same(run_case(layer_case, degree, communicator), expected);
  }
}

TEST(Overlap, GivesTheSameBits) {
  Random random(test_seed());
  for (const auto& layer_case : layer_cases(random, world()->size(), effort(20))) {
    expect_the_same_at_all_degrees(layer_case, world());
  }
}

TEST(Overlap, GivesTheSameBitsInTwoHops) {
  Random random(test_seed());
  for (const auto way : {AllToAll::kHierarchical, AllToAll::kAuto}) {
    HierarchicalOptions options;
    options.all_to_all = way;
    options.node = std::to_string(world()->rank() / 2);
    const auto communicator = make_hierarchical_communicator(world(), options);
    for (const auto& layer_case : layer_cases(random, world()->size(), effort(5))) {
      expect_the_same_at_all_degrees(layer_case, communicator);
    }
  }
}

/// Past the steps that measure.
TEST(Overlap, GivesTheSameBitsWhileItIsChosen) {
  Random random(test_seed());
  auto layer_case = layer_cases(random, world()->size(), 1).front();
  layer_case.options.engine = device().is_cuda() ? "cublas_loop_1" : "auto";
  auto expected_layer = make_layer(layer_case, world());
  const auto expected = results_of(
      expected_layer, run_step(expected_layer, layer_case, layer_case.counts, world()->rank()));
  layer_case.options.overlap = "auto";
  auto layer = make_layer(layer_case, world());
  for (int64_t step = 0; step < 4 * OverlapChoice::kRounds + 2; ++step) {
    SCOPED_TRACE(step);
    layer->zero_grad();
    expect_the_same(
        results_of(layer, run_step(layer, layer_case, layer_case.counts, world()->rank())),
        expected);
  }
}

/// Milliseconds of a forward and of a backward.
using TimeOf = std::function<int64_t(int64_t degree, bool backward)>;

/// The degrees of `steps` steps that take so long.
std::vector<int64_t> degrees_of(OverlapChoice& choice, int64_t steps, const TimeOf& time_of) {
  std::vector<int64_t> degrees;
  for (int64_t step = 0; step < steps; ++step) {
    const auto way = choice.begin_step(*world(), torch::kCPU);
    for (const bool backward : {false, true}) {
      auto begin = OverlapChoice::begin(way, torch::kCPU);
      std::this_thread::sleep_for(std::chrono::milliseconds(time_of(way.degree, backward)));
      choice.note(way, backward, std::move(begin), torch::kCPU);
    }
    degrees.push_back(way.degree);
  }
  return degrees;
}

TEST(Overlap, IsChosenByTheSlowestRanksTimes) {
  ANABRANCH_NEEDS_RANKS(2);
  MoEOptions options;
  options.overlap = "auto";
  const int64_t measuring = 4 * OverlapChoice::kRounds;
  // Rank 0 would take 1, whose backward is slow elsewhere.
  OverlapChoice choice(options);
  const auto degrees = degrees_of(choice, measuring + 2, [](int64_t degree, bool backward) {
    if (degree == 1) return backward && world()->rank() > 0 ? 60 : 1;
    return degree == 2 ? 5 : 20;
  });
  EXPECT_EQ(std::vector(degrees.begin(), degrees.begin() + 5),
            (std::vector<int64_t>{0, 1, 2, 4, 0}));
  EXPECT_EQ(degrees[measuring], 2);
  EXPECT_EQ(degrees[measuring + 1], 2);
  OverlapChoice none(options);
  EXPECT_EQ(
      degrees_of(none, measuring + 1, [](int64_t degree, bool) { return degree == 0 ? 1 : 10; })
          .back(),
      0);
}

TEST(Overlap, RefusesWaysThatAreNone) {
  MoEOptions options;
  for (const char* overlap : {"3", "", "Auto", "on"}) {
    options.overlap = overlap;
    EXPECT_THROW(OverlapChoice{options}, InputError) << overlap;
  }
  options.overlap = "auto";
  options.engine = "deterministic";
  EXPECT_THROW(OverlapChoice{options}, InputError);
}

MoEOptions small_options(Random& random) {
  MoEOptions options;
  options.hidden_size = 16;
  options.expert_hidden_size = 24;
  options.num_experts = random.integer(1, 13);
  options.top_k = random.integer(1, options.num_experts);
  options.renormalize = options.top_k > 1;
  options.glu = random.chance();
  options.bias = random.chance();
  options.recompute = random.chance();
  options.shared_expert_hidden_size = random.pick<int64_t>({0, 8});
  options.device = device();
  return options;
}

/// Ids of none among others, tokens without any, and every expert for each token.
TEST(Overlap, GivesTheSameBitsWhereIdsAreNone) {
  Random random(test_seed());
  for (int64_t i = effort(20); i > 0; --i) {
    const MoEOptions options = small_options(random);
    auto layer_case = draw_layer_case(random, world()->size(), options, random.integer(0, 40),
                                      random.pick(all_skews()), random.pick(all_splits()), true);
    const auto none = random.uniform(layer_case.expert_ids.sizes()) < random.uniform();
    const auto run = [&](const std::string& overlap) {
      MoEOptions with = options;
      with.overlap = overlap;
      with.engine = device().is_cuda() ? "cublas_loop_1" : "auto";
      LayerCase of_case = layer_case;
      of_case.options = with;
      auto layer = make_layer(of_case, world());
      const int rank = world()->rank();
      auto x = shard(layer_case.x, layer_case.counts, rank).requires_grad_();
      auto weights = shard(layer_case.weights, layer_case.counts, rank).requires_grad_();
      Routing routing;
      routing.expert_ids =
          shard(layer_case.expert_ids.masked_fill(none, -1), layer_case.counts, rank);
      routing.weights = weights;
      routing.may_skip = true;
      Step step{layer->forward(x, routing), x, weights};
      step.output.output.backward(shard(layer_case.doutput, layer_case.counts, rank));
      return results_of(layer, step);
    };
    SCOPED_TRACE(layer_case.describe());
    const auto expected = run("off");
    for (const auto& degree : kDegrees) {
      SCOPED_TRACE(degree);
      expect_the_same(run(degree), expected);
    }
  }
}

/// Few experts a rank, so that one is in several chunks, with rows enough for a CPU to multiply it in pieces, whose
/// ends are not those of the chunks.
TEST(Overlap, GivesTheSameBitsWhereAnExpertIsInSeveralChunks) {
  Random random(test_seed());
  for (int64_t i = effort(12); i > 0; --i) {
    MoEOptions options = small_options(random);
    options.num_experts = world()->size() * random.pick<int64_t>({1, 1, 2, 3, 4});
    options.top_k = random.integer(1, std::min<int64_t>(options.num_experts, 3));
    options.renormalize = options.top_k > 1;
    const auto layer_case =
        draw_layer_case(random, world()->size(), options, random.integer(0, 600) * world()->size(),
                        random.pick(all_skews()), random.pick(all_splits()), random.chance());
    expect_the_same_at_all_degrees(layer_case, world());
  }
}

/// A token still crosses to a rank once, whatever the chunks of its experts are.
TEST(Overlap, SendsTheSameBytesInMoreCalls) {
  ANABRANCH_NEEDS_RANKS(2);
  Random random(test_seed());
  MoEOptions options = small_options(random);
  options.num_experts = 8 * world()->size();
  options.top_k = 5;
  options.renormalize = true;
  options.engine = "deterministic";  // the first step agrees on nothing
  const auto layer_case =
      draw_layer_case(random, world()->size(), options, 60, Skew::kUniform, Split::kUneven, true);
  const auto traffic_of = [&](const std::string& overlap) {
    auto of_case = layer_case;
    of_case.options.overlap = overlap;
    auto layer = make_layer(of_case, world());
    world()->reset_traffic();
    run_step(layer, of_case, of_case.counts, world()->rank());
    return world()->traffic();
  };
  const Traffic in_turn = traffic_of("off");
  for (const auto& degree : kDegrees) {
    const Traffic beside = traffic_of(degree);
    EXPECT_EQ(beside.bytes_sent, in_turn.bytes_sent) << degree;
    EXPECT_EQ(beside.bytes_received, in_turn.bytes_received) << degree;
    // In one chunk the rows of forward set out with what the plan is made of, but where a CPU computes the shared
    // expert while they travel.
    const int64_t chunks = std::stoll(degree);
    const bool with_plan =
        chunks == 1 && (options.shared_expert_hidden_size == 0 || device().is_cuda());
    EXPECT_EQ(beside.collectives, in_turn.collectives + (with_plan ? 0 : 1) + 4 * (chunks - 1))
        << degree;
  }
}

/// Whether element `i` of so many is in that one of `parts` nearly equal parts.
bool is_in_part(int64_t i, int64_t elements, int64_t part, int64_t parts) {
  const auto begin = [&](int64_t p) { return elements / parts * p + elements % parts * p / parts; };
  return begin(part) <= i && i < begin(part + 1);
}

/// Against the definition, row by row.
TEST(Overlap, SendsARowWithTheFirstChunkThatNeedsItAndBackWithTheLast) {
  ANABRANCH_NEEDS_RANKS(2);
  Random random(test_seed());
  const int ranks = world()->size();
  for (int64_t i = effort(10); i > 0; --i) {
    const int64_t experts = random.integer(1, 6 * ranks);
    const int64_t top_k = random.integer(1, experts);
    const int64_t chunks = random.pick<int64_t>({2, 4, 8});
    const auto ids = random_expert_ids(random, 30 * ranks, experts, top_k, Skew::kZipf)
                         .narrow(0, 30 * world()->rank(), 30)
                         .contiguous();
    const Exchange exchange(world(), experts);
    Routing routing;
    routing.expert_ids = on_device(ids);
    routing.weights = on_device(torch::ones({30, top_k}));
    const auto plan =
        in_chunks(exchange.plan(routing), chunks, exchange.placement(), world()->rank());
    std::vector<std::vector<int64_t>> sent(chunks, std::vector<int64_t>(ranks, 0));
    std::vector<std::vector<int64_t>> returned = sent;
    const auto id = ids.accessor<int64_t, 2>();
    for (int64_t token = 0; token < 30; ++token) {
      for (int rank = 0; rank < ranks; ++rank) {
        int64_t first = chunks, last = -1;
        for (int64_t slot = 0; slot < top_k; ++slot) {
          const int64_t local = id[token][slot] - exchange.placement().first_place(rank);
          const int64_t here = exchange.placement().local_experts(rank);
          if (local < 0 || local >= here) continue;
          // Blocks of ranks whose rows for an expert come apart; the destination's own come first.
          const int64_t blocks = std::clamp<int64_t>(chunks / here, 1, ranks);
          int64_t turn = 0;
          for (int64_t own = 0; own < blocks; ++own) {
            for (int64_t source = 0; source < blocks; ++source) {
              if (is_in_part(rank, ranks, own, blocks) &&
                  is_in_part(world()->rank(), ranks, source, blocks)) {
                turn = (source + blocks - own) % blocks;
              }
            }
          }
          for (int64_t c = 0; c < chunks; ++c) {
            const bool own = is_in_part(local * blocks + turn, here * blocks, c, chunks);
            first = own ? std::min(first, c) : first;
            last = own ? std::max(last, c) : last;
          }
        }
        if (last >= 0) {
          ++sent[first][rank];
          ++returned[last][rank];
        }
      }
    }
    ASSERT_EQ(plan.chunks.size(), static_cast<size_t>(chunks));
    for (int64_t c = 0; c < chunks; ++c) {
      EXPECT_EQ(plan.chunks[c].send_rows, sent[c]);
      EXPECT_EQ(plan.chunks[c].returned_rows, returned[c]);
    }
  }
}

TEST(Overlap, IsRefusedWhereItIsNone) {
  MoEOptions options;
  options.hidden_size = options.expert_hidden_size = options.num_experts = 4;
  options.overlap = "3";
  EXPECT_THROW(MoELayer(options, world()), InputError);
}

}  // namespace
}  // namespace anabranch::test
