// What a step of the layer puts on the wire, counted by the communicator, against a count from the
// expert ids: every token once to each rank that holds one of its experts, and nothing else of its
// width.
#include <gtest/gtest.h>

#include <set>

#include "support/devices.h"
#include "support/layer_case.h"
#include "support/tolerance.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

class TrafficTest : public ::testing::Test {
 protected:
  struct Count {
    int64_t rows_out = 0, rows_in = 0;                // (token, other rank) pairs
    int64_t assignments_out = 0, assignments_in = 0;  // (token, other rank's expert) pairs
  };
  Count count(const torch::Tensor& expert_ids, const std::vector<int64_t>& counts,
              const ExpertPlacement& placement) const;
  Traffic sum_of_losses(int64_t num_experts) const;

  std::shared_ptr<Communicator> world_ = world();
  int rank_ = world_->rank();
  int size_ = world_->size();
  Random random_{test_seed()};
};

TrafficTest::Count TrafficTest::count(const torch::Tensor& expert_ids,
                                      const std::vector<int64_t>& counts,
                                      const ExpertPlacement& placement) const {
  Count result;
  const auto ids = expert_ids.accessor<int64_t, 2>();
  int64_t token = 0;
  for (int source = 0; source < size_; ++source) {
    for (int64_t t = 0; t < counts[source]; ++t, ++token) {
      std::set<int64_t> destinations;
      for (int64_t k = 0; k < expert_ids.size(1); ++k) {
        int64_t owner = 0;
        while (ids[token][k] >= placement.first_place(owner + 1)) {
          ++owner;
        }
        destinations.insert(owner);
        result.assignments_out += source == rank_ && owner != rank_ ? 1 : 0;
        result.assignments_in += source != rank_ && owner == rank_ ? 1 : 0;
      }
      if (source == rank_) {
        result.rows_out += static_cast<int64_t>(destinations.size() - destinations.count(rank_));
      } else {
        result.rows_in += static_cast<int64_t>(destinations.count(rank_));
      }
    }
  }
  return result;
}

// Load and losses of the whole batch are one sum over the ranks: 8 bytes for each expert's load, for each
// expert's probability, for the tokens and for the z-loss; as long for a routing from outside.
Traffic TrafficTest::sum_of_losses(int64_t num_experts) const {
  auto sums = torch::zeros({2 * num_experts + 2}, torch::dtype(torch::kFloat64).device(device()));
  world_->reset_traffic();
  world_->all_reduce(sums);
  return world_->traffic();
}

TEST_F(TrafficTest, BytesAreTheDeduplicatedMinimum) {
  for (auto& layer_case : layer_cases(random_, size_, effort(20))) {
    SCOPED_TRACE(layer_case.describe());
    layer_case.options.engine = "deterministic";  // the first step agrees on nothing
    layer_case.options.receive_rows_limit = 0;
    layer_case.options.balance = "off";
    layer_case.options.placement = "blocks";
    const auto& options = layer_case.options;
    const ExpertPlacement placement{options.num_experts, size_};
    const auto expected = run_reference(layer_case, size_);
    const auto pairs = count(expected.result.expert_ids, layer_case.counts, placement);
    const auto losses = sum_of_losses(options.num_experts);
    const int64_t row_bytes =
        options.hidden_size * static_cast<int64_t>(c10::elementSize(options.dtype));
    const int64_t value_bytes = options.dtype == torch::kFloat64 ? 8 : 4;

    // Announced before any row moves: to each other rank 4 numbers and one for each of its experts;
    // then 4 bytes an assignment, the row it belongs to.
    const auto own_experts = placement.local_experts(rank_);
    const int64_t announced_out = 8 * (4 * (size_ - 1) + options.num_experts - own_experts);
    const int64_t announced_in = 8 * (4 + own_experts) * (size_ - 1);

    auto layer = make_layer(layer_case, world_);
    world_->reset_traffic();
    const auto step = run_step(layer, layer_case, layer_case.counts, rank_);
    // Rows go out and come back in forward, and again in backward. Routing weights go out in forward,
    // their gradients come back in backward.
    const auto there_and_back = [&](int64_t rows, int64_t assignments) {
      return rows * row_bytes + assignments * value_bytes;
    };
    EXPECT_EQ(world_->traffic().bytes_sent,
              announced_out + 4 * pairs.assignments_out + losses.bytes_sent +
                  there_and_back(2 * pairs.rows_out + 2 * pairs.rows_in,
                                 pairs.assignments_out + pairs.assignments_in));
    EXPECT_EQ(world_->traffic().bytes_received,
              announced_in + 4 * pairs.assignments_in + losses.bytes_received +
                  there_and_back(2 * pairs.rows_out + 2 * pairs.rows_in,
                                 pairs.assignments_out + pairs.assignments_in));
  }
}

TEST_F(TrafficTest, StagesAreMeasuredWhereThatIsAskedFor) {
  auto layer_case = layer_cases(random_, size_, 1).front();
  auto layer = make_layer(layer_case, world_);
  run_step(layer, layer_case, layer_case.counts, rank_);
  EXPECT_TRUE(layer->stage_seconds().empty());
  layer->measure_stages();
  run_step(layer, layer_case, layer_case.counts, rank_);
  auto seconds = layer->stage_seconds();
  for (const std::string stage : {"plan", "combine", "combine.backward", "dispatch.backward"}) {
    EXPECT_EQ(seconds.count("anabranch." + stage), 1) << stage;
  }
  for (const std::string stage : {"exchange", "exchange.exposed"}) {
    EXPECT_EQ(seconds.count("anabranch." + stage), size_ > 1 ? 1 : 0) << stage;
  }
  for (const auto& [stage, taken] : seconds) EXPECT_GE(taken, 0) << stage;
  layer->measure_stages(false);
  EXPECT_TRUE(layer->stage_seconds().empty());
}

TEST_F(TrafficTest, OneRankSendsNothing) {
  const auto self = make_self_communicator();
  MoEOptions options;
  options.hidden_size = options.expert_hidden_size = 8;
  options.num_experts = 4;
  options.top_k = 2;
  const auto layer_case =
      draw_layer_case(random_, 1, options, 20, Skew::kUniform, Split::kEven, false);
  auto layer = make_layer(layer_case, self);
  run_step(layer, layer_case, {20}, 0);
  EXPECT_EQ(self->traffic().bytes_sent, 0);
  EXPECT_EQ(self->traffic().bytes_received, 0);
}

}  // namespace
}  // namespace anabranch::test
