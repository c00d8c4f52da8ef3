// How long rows are under way, and how long a rank does nothing but wait for them.
#include <anabranch/exchange.h>
#include <gtest/gtest.h>

#include <chrono>
#include <thread>

#include "exchange/moving.h"
#include "support/random_routing.h"
#include "support/stage_times.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

constexpr std::chrono::milliseconds kWait{20};
constexpr std::chrono::milliseconds kWork{30};
constexpr double kWaitSeconds = 0.02;
constexpr double kWorkSeconds = 0.03;

/// The world's ranks, where whoever waits for rows waits so much longer.
class Slow final : public Communicator {
 public:
  Slow() : Communicator(world()->rank(), world()->size()) {}
  std::string name() const override { return "slow"; }

 protected:
  std::unique_ptr<Pending> start(Collective call, Messages messages) override {
    class Late final : public Pending {
     public:
      explicit Late(std::unique_ptr<Pending> messages) : messages_(std::move(messages)) {}
      void finish() override {
        messages_->finish();
        std::this_thread::sleep_for(kWait);
      }

     private:
      std::unique_ptr<Pending> messages_;
    };
    return std::make_unique<Late>(start_by(*world(), call, std::move(messages)));
  }
  std::shared_ptr<Communicator> regroup(const std::vector<int>&, int) override { return nullptr; }
  void check_device(torch::Device) const override {}
};

Routing uniform_routing(int64_t tokens, int64_t experts) {
  Random random(test_seed());
  Routing routing;
  routing.expert_ids = random_expert_ids(random, tokens, experts, /*top_k=*/2, Skew::kUniform);
  routing.weights = torch::ones({tokens, 2});
  return routing;
}

/// Seconds by stage of a dispatch and its combine, beside which work is done.
std::map<std::string, double> seconds_of(Travel travel) {
  const int64_t experts = 2 * world()->size();
  const Exchange exchange(std::make_shared<Slow>(), experts);
  const auto plan = exchange.plan(uniform_routing(16, experts));
  StageTimes times;
  {
    const StageTimes::Measuring measuring(&times, torch::kCPU);
    Dispatching dispatching(exchange.communicator(), {torch::randn({16, 4}), {}}, plan, travel);
    std::this_thread::sleep_for(kWork);
    dispatching.wait_for_next();
    Combining combining(exchange.communicator(), plan, travel);
    combining.send({dispatching.received().rows, {}});
    std::this_thread::sleep_for(kWork);
    combining.finish();
  }
  return times.seconds();
}

TEST(ExposedExchange, IsTheWaitingAlone) {
  ANABRANCH_NEEDS_RANKS(2);
  auto beside = seconds_of(Travel::kBeside);
  EXPECT_GE(beside.at("anabranch.exchange.exposed"), 2 * kWaitSeconds);
  EXPECT_GE(beside.at("anabranch.exchange") - beside.at("anabranch.exchange.exposed"),
            2 * kWorkSeconds);
  // In turn rows set out when somebody waits for them.
  auto in_turn = seconds_of(Travel::kInTurn);
  EXPECT_GE(in_turn.at("anabranch.exchange.exposed"), 2 * kWaitSeconds);
  EXPECT_LT(in_turn.at("anabranch.exchange") - in_turn.at("anabranch.exchange.exposed"),
            2 * kWorkSeconds);
}

TEST(ExposedExchange, IsNoneOfARankAlone) {
  const Exchange exchange(make_self_communicator(), 4);
  const auto plan = exchange.plan(uniform_routing(16, 4));
  StageTimes times;
  const StageTimes::Measuring measuring(&times, torch::kCPU);
  Dispatching dispatching(exchange.communicator(), {torch::randn({16, 4}), {}}, plan,
                          Travel::kBeside);
  dispatching.wait_for_next();
  EXPECT_EQ(times.seconds().count("anabranch.exchange.exposed"), 0);
}

}  // namespace
}  // namespace anabranch::test
