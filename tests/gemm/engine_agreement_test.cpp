// What auto does where it has several engines to choose from, with engines made for it, on the CPU: one that is
// fast on rank 0 alone, and one that is fast on the others. Its cache cannot be written.
#include <anabranch/moe_layer.h>
#include <gtest/gtest.h>

#include <chrono>
#include <cstdlib>
#include <numeric>
#include <thread>

#include "gemm/cpu/cpu_engine.h"
#include "gemm/engines.h"
#include "support/random.h"
#include "support/tolerance.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

using Counts = std::vector<int64_t>;

/// What a call of an engine takes, and how many there were that had rows.
struct Pace {
  std::chrono::microseconds delay{0};
  int64_t calls = 0;
};
Pace hare;
Pace tortoise;

/// The CPU's engine at a pace.
class Paced final : public GroupedGemmEngine {
 public:
  Paced(const char* name, Pace& pace) : name_(name), pace_(pace) {}
  std::string name() const override { return name_; }

 private:
  GroupedGemmEngine& step(const torch::Tensor& rows) {
    if (rows.size(0) > 0) {
      ++pace_.calls;
      std::this_thread::sleep_for(pace_.delay);
    }
    return *engine_;
  }
  void do_forward(const torch::Tensor& x, const torch::Tensor& weight, const ExpertCounts& counts,
                  torch::Tensor& y) override {
    step(x).forward(x, weight, counts, y);
  }
  void do_dgrad(const torch::Tensor& dy, const torch::Tensor& weight, const ExpertCounts& counts,
                torch::Tensor& dx) override {
    step(dy).dgrad(dy, weight, counts, dx);
  }
  void do_wgrad(const torch::Tensor& dy, const torch::Tensor& x, const ExpertCounts& counts,
                torch::Tensor& dweight) override {
    step(dy).wgrad(dy, x, counts, dweight);
  }

  const char* name_;
  Pace& pace_;
  std::shared_ptr<GroupedGemmEngine> engine_ = make_cpu_engine();
};

const bool kPrepared = [] {
  setenv("ANABRANCH_CACHE_DIR", "/dev/null/no/folder", /*overwrite=*/1);
  const auto on_cpu = [](torch::Device device) { return device.is_cpu(); };
  const auto cpu = [](torch::Device) { return make_cpu_engine(); };
  register_engine({"cpu", on_cpu, cpu, /*considered_by_auto=*/false});
  for (const auto& [name, pace] : {std::pair("hare", &hare), {"tortoise", &tortoise}}) {
    const auto make = [name = name, pace = pace](torch::Device) {
      return std::make_shared<Paced>(name, *pace);
    };
    register_engine({name, on_cpu, make, /*considered_by_auto=*/true});
  }
  return true;
}();

class EngineAgreementTest : public ::testing::Test {
 protected:
  EngineAgreementTest() { hare = tortoise = {}; }
  // Sizes are another test's: a process measures a product once.
  MoEOptions options(int64_t hidden) const {
    MoEOptions options;
    options.hidden_size = hidden;
    options.expert_hidden_size = 12;
    options.num_experts = 5;
    options.top_k = 2;
    options.seed = 3;
    return options;
  }

  std::shared_ptr<Communicator> world_ = world();
  int rank_ = world_->rank();
  Random random_{test_seed()};
};

// Each would choose its own otherwise. In the first steps no rank has tokens, and then one.
TEST_F(EngineAgreementTest, RanksTakeWhatRank0Chose) {
  ANABRANCH_NEEDS_RANKS(2);
  (rank_ == 0 ? tortoise : hare).delay = std::chrono::milliseconds(2);
  auto moe = options(8);
  for (const bool shared : {false, true}) {
    SCOPED_TRACE(shared);
    moe.hidden_size += 8;  // nothing is known of it yet
    moe.shared_expert_hidden_size = shared ? 20 : 0;
    MoELayer layer(moe, world_);
    hare.calls = tortoise.calls = 0;
    const auto step = [&](int64_t tokens) {
      const auto x = random_.normal({tokens, moe.hidden_size}, torch::kFloat32).requires_grad_();
      layer->forward(x).output.sum().backward();
    };
    step(0);
    EXPECT_EQ(hare.calls + tortoise.calls, 0);
    step(rank_ == world_->size() - 1 ? 40 : 0);
    if (rank_ == 0) {
      EXPECT_GT(tortoise.calls, 0) << "it was measured";
      tortoise.calls = 0;
    }
    for (const int64_t tokens : {7, 300, 1, 2000}) {
      step(tokens * (rank_ + 1));
    }
    EXPECT_EQ(tortoise.calls, 0);
    EXPECT_GT(hare.calls, 0);
  }
}

TEST_F(EngineAgreementTest, ADeterministicLayerMeasuresNothing) {
  (rank_ == 0 ? hare : tortoise).delay = std::chrono::milliseconds(2);
  auto moe = options(40);
  moe.engine = "deterministic";
  MoELayer layer(moe, world_);
  for (const int64_t tokens : {3, 90}) {
    const auto x = random_.normal({tokens, moe.hidden_size}, torch::kFloat32).requires_grad_();
    layer->forward(x).output.sum().backward();
  }
  EXPECT_EQ(tortoise.calls, 0) << "the first of those that the rule does not know";
  EXPECT_GT(hare.calls, 0);
}

class AutoTest : public EngineAgreementTest {
 protected:
  void multiply(GroupedGemmEngine& engine, int64_t n, const Counts& counts) {
    const auto rows = std::accumulate(counts.begin(), counts.end(), int64_t{0});
    const auto x = random_.normal({rows, 8}, torch::kFloat32);
    const auto weight =
        random_.normal({static_cast<int64_t>(counts.size()), n, 8}, torch::kFloat32);
    grouped_gemm(engine, x, weight, counts);
  }
  std::shared_ptr<GroupedGemmEngine> engine_ = make_grouped_gemm_engine(torch::kCPU);
};

// One rank that measures lets the others wait, at the next gradient at the latest.
TEST_F(AutoTest, MeasuresBrieflyWhereASimilarProductIsKnown) {
  constexpr std::chrono::milliseconds kDelay{10};
  hare.delay = tortoise.delay = kDelay;
  multiply(*engine_, 16, {50, 50});
  hare.calls = tortoise.calls = 0;
  multiply(*engine_, 16, {400, 400});
  // A turn of three calls each, and what fits into 50 ms; with all turns it would be about 100.
  EXPECT_LE(hare.calls + tortoise.calls, 16);

  // What was several times slower is not tried again.
  hare.delay = std::chrono::milliseconds(0);
  multiply(*engine_, 24, {50, 50});
  tortoise.calls = 0;
  for (const Counts& counts : {Counts{200, 200}, {7, 200}, {0, 30}}) {
    multiply(*engine_, 24, counts);
  }
  EXPECT_EQ(tortoise.calls, 0);
}

TEST_F(AutoTest, OnceSettledMeasuresNothing) {
  hare.delay = std::chrono::milliseconds(2);
  multiply(*engine_, 32, {20, 30});
  const auto other = make_grouped_gemm_engine(torch::kCPU);
  EXPECT_FALSE(other->is_settled());
  other->settle_on(engine_->choices());
  EXPECT_TRUE(other->is_settled());
  EXPECT_EQ(other->choices(), engine_->choices());
  hare.calls = tortoise.calls = 0;
  for (const Counts& counts : {Counts{20, 30}, {1000, 2}, {5}}) {
    multiply(*other, 32, counts);
  }
  EXPECT_EQ(hare.calls, 0);
  EXPECT_EQ(tortoise.calls, 3);
  multiply(*other, 33, {4, 4});  // nothing is known of its kind
  EXPECT_EQ(hare.calls, 1);
  EXPECT_EQ(tortoise.calls, 3);
}

TEST_F(AutoTest, MeasuresNothingWherePyTorchRefusesWhatIsNotDeterministic) {
  hare.delay = std::chrono::milliseconds(2);
  at::Context& context = at::globalContext();
  const bool before = context.deterministicAlgorithms();
  const bool warned_only = context.deterministicAlgorithmsWarnOnly();
  context.setDeterministicAlgorithms(true, /*warn_only=*/false);
  multiply(*engine_, 48, {20, 30});
  context.setDeterministicAlgorithms(before, warned_only);
  EXPECT_EQ(hare.calls, 1);
  EXPECT_EQ(tortoise.calls, 0);
}

}  // namespace
}  // namespace anabranch::test
