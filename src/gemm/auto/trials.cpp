#include "gemm/auto/trials.h"

#include <algorithm>
#include <chrono>
#include <limits>
#include <map>
#include <numeric>
#include <random>

#include "gemm/auto/measuring.h"

namespace anabranch {
namespace {

/// An engine must be so much faster than a better guess to be chosen in its place: less is noise, and
/// the better guess needs less memory.
constexpr double kNoise = 0.99;

double host_milliseconds(const std::function<void()>& call) {
  const auto begin = std::chrono::steady_clock::now();
  call();
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin)
      .count();
}

/// Engines that take turns at one product. Those that find too little memory drop out.
class Trials {
 public:
  Trials(const Run& run, torch::Device device, double most_milliseconds)
      : run_(run),
        time_(device.is_cuda() ? gpu_milliseconds : host_milliseconds),
        most_milliseconds_(most_milliseconds) {}

  /// The first calls, which set up. Those that take long count: setting up is lost in them.
  void warm_up(Engines& engines) {
    std::erase_if(engines,
                  [&](const auto& engine) { return !has_memory_for(*engine, kFirstTurn); });
  }
  /// So many rounds, or fewer where they take long; each in another order: a product that keeps the chip
  /// cool lends the next one its clock.
  void take_turns(Engines& engines, int rounds) {
    for (int round = 0; round < rounds; ++round) {
      Engines order = engines;
      std::shuffle(order.begin(), order.end(), generator_);
      for (const auto& engine : order) {
        if (spent_ > most_milliseconds_ && !times_[engine->name()].empty()) continue;
        if (!has_memory_for(*engine, kLaterTurn)) std::erase(engines, engine);
      }
    }
  }
  /// The mean, as of many steps; without the slowest eighth, in which the host was held up.
  double milliseconds(const std::string& engine) const {
    auto times = times_.at(engine);
    std::sort(times.begin(), times.end());
    times.resize(times.size() - times.size() / 8);
    return std::accumulate(times.begin(), times.end(), 0.0) / static_cast<double>(times.size());
  }
  double least_milliseconds() const {
    double least = std::numeric_limits<double>::infinity();
    for (const auto& [engine, times] : times_) {
      least = std::min(least, milliseconds(engine));
    }
    return least;
  }
  /// What was found, without an engine yet.
  EngineChoices::Choice choice() const {
    EngineChoices::Choice choice;
    for (const auto& [engine, times] : times_) {
      choice.milliseconds[engine] = milliseconds(engine);
    }
    choice.complete = complete_;
    return choice;
  }

 private:
  enum Turn { kFirstTurn, kLaterTurn };
  static constexpr double kLong = 1000;  // milliseconds of a call

  bool has_memory_for(GroupedGemmEngine& engine, Turn turn) {
    const auto call = [&] { run_(engine); };
    auto& times = times_[engine.name()];
    try {
      // As in training, the host is ahead of the GPU, and the clocks are up.
      const bool warm = turn == kLaterTurn && (times.empty() || times.back() < kLong);
      if (warm) call();
      const double time = time_(call);
      if (turn == kFirstTurn && time < kLong) return true;
      times.push_back(time);
      spent_ += warm ? 2 * time : time;
      return true;
    } catch (const c10::OutOfMemoryError&) {
      times_.erase(engine.name());
      complete_ = false;
      return false;
    }
  }

  const Run& run_;
  double (*time_)(const std::function<void()>&);
  std::map<std::string, std::vector<double>> times_;
  std::mt19937 generator_{1};
  double most_milliseconds_;
  double spent_ = 0;
  bool complete_ = true;
};

}  // namespace

EngineChoices::Choice fastest(Engines engines, const Run& run, torch::Device device,
                              double most_milliseconds) {
  if (engines.size() == 1) {
    return {engines.front()->name(), {}};
  }
  constexpr int kRounds = 4;
  constexpr int kFinalRounds = 20;
  constexpr double kNear = 1.1;
  Trials trials(run, device, most_milliseconds);
  trials.warm_up(engines);
  trials.take_turns(engines, kRounds);
  const double best = trials.least_milliseconds();
  std::erase_if(engines, [&](const auto& engine) {
    return trials.milliseconds(engine->name()) >= kNear * best;
  });
  trials.take_turns(engines, kFinalRounds);
  EngineChoices::Choice choice = trials.choice();
  for (const auto& engine : engines) {
    const double time = trials.milliseconds(engine->name());
    if (choice.engine.empty() || time < kNoise * trials.milliseconds(choice.engine)) {
      choice.engine = engine->name();
    }
  }
  return choice;
}

}  // namespace anabranch
