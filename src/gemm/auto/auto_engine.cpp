#include "gemm/auto/auto_engine.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>

#include <algorithm>
#include <bit>
#include <functional>
#include <limits>
#include <numeric>
#include <random>

#include "gemm/cuda_engines.h"
#include "gemm/auto/engine_choices.h"
#include "support/cuda_device.h"
#include "support/cuda_handle.h"

namespace anabranch {
namespace {

using Counts = std::vector<int64_t>;

/// An engine must be so much faster than a better guess to be chosen in its place: less is noise, and
/// the better guess needs less memory.
constexpr double kNoise = 0.99;

/// `size` by its first two binary digits.
int64_t bucket(int64_t size) {
  if (size < 2) {
    return size;
  }
  const int shift = std::bit_width(static_cast<uint64_t>(size)) - 2;
  return size >> shift << shift;
}

/// Times that the fullest expert's rows are those of the mean, as a power of two.
int skew(const Counts& counts) {
  const int64_t rows = std::accumulate(counts.begin(), counts.end(), int64_t{0});
  const int64_t largest = *std::max_element(counts.begin(), counts.end());
  const int64_t ratio = 2 * largest * static_cast<int64_t>(counts.size()) / (3 * rows);
  return std::bit_width(static_cast<uint64_t>(ratio));
}

double milliseconds(const std::function<void()>& call, cudaStream_t stream) {
  const auto timed_event = [] {
    cudaEvent_t event = nullptr;
    check_cuda(cudaEventCreate(&event), "cudaEventCreate");
    return CudaEvent(event);
  };
  const CudaEvent begin = timed_event();
  const CudaEvent end = timed_event();
  check_cuda(cudaEventRecord(begin, stream), "cudaEventRecord");
  call();
  check_cuda(cudaEventRecord(end, stream), "cudaEventRecord");
  check_cuda(cudaEventSynchronize(end), "cudaEventSynchronize");
  float elapsed = 0;
  check_cuda(cudaEventElapsedTime(&elapsed, begin, end), "cudaEventElapsedTime");
  return elapsed;
}

using Engines = std::vector<std::shared_ptr<GroupedGemmEngine>>;

/// Engines that take turns at one product. Those that find too little memory drop out.
class Trials {
 public:
  using Run = std::function<void(GroupedGemmEngine&)>;
  Trials(const Run& run, cudaStream_t stream) : run_(run), stream_(stream) {}

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
        if (spent_ > kMostSpent && !times_[engine->name()].empty()) continue;
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
  static constexpr double kLong = 1000;       // milliseconds of a call
  static constexpr double kMostSpent = 2000;  // milliseconds of all turns, once each had one

  bool has_memory_for(GroupedGemmEngine& engine, Turn turn) {
    const auto call = [&] { run_(engine); };
    auto& times = times_[engine.name()];
    try {
      // As in training, the host is ahead of the GPU, and the clocks are up.
      const bool warm = turn == kLaterTurn && (times.empty() || times.back() < kLong);
      if (warm) call();
      const double time = anabranch::milliseconds(call, stream_);
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
  cudaStream_t stream_;
  std::map<std::string, std::vector<double>> times_;
  std::mt19937 generator_{1};
  double spent_ = 0;
  bool complete_ = true;
};

class AutoEngine final : public GroupedGemmEngine {
 public:
  explicit AutoEngine(torch::Device device) : device_(device), choices_(shared_choices(device)) {}

  std::string name() const override { return "auto"; }
  std::string explain() const override { return choices_->explain(); }

  void forward(const torch::Tensor& x, const torch::Tensor& weight, const Counts& counts,
               torch::Tensor& y) override {
    const auto run = [&](GroupedGemmEngine& engine) { engine.forward(x, weight, counts, y); };
    run(best("forward", weight, counts, x, run));
  }
  void dgrad(const torch::Tensor& dy, const torch::Tensor& weight, const Counts& counts,
             torch::Tensor& dx) override {
    const auto run = [&](GroupedGemmEngine& engine) { engine.dgrad(dy, weight, counts, dx); };
    run(best("dgrad", weight, counts, dy, run));
  }
  void wgrad(const torch::Tensor& dy, const torch::Tensor& x, const Counts& counts,
             torch::Tensor& dweight) override {
    const auto run = [&](GroupedGemmEngine& engine) { engine.wgrad(dy, x, counts, dweight); };
    run(best("wgrad", dweight, counts, dy, run));
  }

  void wgrad_accumulate(const torch::Tensor& dy, const torch::Tensor& x, const Counts& counts,
                        torch::Tensor& sum) override {
    // What is measured more than once must not be added more than once.
    torch::Tensor scratch;
    const auto try_out = [&](GroupedGemmEngine& engine) {
      if (!scratch.defined()) {
        scratch = at::zeros_like(sum);
      }
      engine.wgrad_accumulate(dy, x, counts, scratch);
    };
    best("wgrad, accumulated", sum, counts, dy, try_out).wgrad_accumulate(dy, x, counts, sum);
  }

  torch::Tensor forward_activated(const torch::Tensor& x, const torch::Tensor& weight,
                                  const Counts& counts, const HiddenActivation& activation,
                                  torch::Tensor& hidden) override {
    const auto run = [&](GroupedGemmEngine& engine) {
      return engine.forward_activated(x, weight, counts, activation, hidden);
    };
    return run(best(activation.glu ? "forward with GLU" : "forward with activation", weight, counts,
                    x, run));
  }

  void dgrad_activated(const torch::Tensor& dy, const torch::Tensor& weight, const Counts& counts,
                       const HiddenActivation& activation, const torch::Tensor& hidden,
                       const torch::Tensor& values, ActivatedGradient& gradient) override {
    // What is measured more than once must not write over what it reads.
    const auto try_out = [&](GroupedGemmEngine& engine) {
      ActivatedGradient scratch = {at::empty_like(hidden), gradient.dvalues, gradient.activated};
      engine.dgrad_activated(dy, weight, counts, activation, hidden, values, scratch);
    };
    best(activation.glu ? "dgrad with GLU" : "dgrad with activation", weight, counts, dy, try_out)
        .dgrad_activated(dy, weight, counts, activation, hidden, values, gradient);
  }

 private:
  /// One for all layers of a device.
  static std::shared_ptr<EngineChoices> shared_choices(torch::Device device) {
    static std::mutex mutex;
    static std::map<torch::DeviceIndex, std::shared_ptr<EngineChoices>> by_device;
    const std::lock_guard lock(mutex);
    auto& choices = by_device[device.index()];
    if (choices == nullptr) {
      choices = std::make_shared<EngineChoices>(engine_choices_file(device));
    }
    return choices;
  }

  /// All that can multiply rows of that type with `weight`, best guess first, and of the loops that of
  /// the fewest workspaces. Eight streams gain nothing over four, and their workspaces take 128 MiB
  /// more.
  Engines able_engines(torch::Dtype dtype, const torch::Tensor& weight) const {
    Engines able;
    for (const auto& name : cuda_engine_names(device_)) {
      if (name == "cublas_loop_8") continue;
      auto engine = make_cuda_engine(device_, name);
      if (engine->supports(dtype, weight.size(1), weight.size(2))) {
        able.push_back(std::move(engine));
      }
    }
    const auto is_loop = [](const auto& engine) {
      return engine->name().starts_with("cublas_loop_");
    };
    const auto loops = std::find_if(able.begin(), able.end(), is_loop);
    std::sort(loops, std::find_if_not(loops, able.end(), is_loop),
              [](const auto& a, const auto& b) { return a->name() < b->name(); });
    return able;
  }

  /// The first engine that can.
  GroupedGemmEngine& best_guess(torch::Dtype dtype, const torch::Tensor& weight) {
    const auto names = cuda_engine_names(device_);
    const auto able = std::find_if(names.begin(), names.end(), [&](const std::string& name) {
      return engine(name).supports(dtype, weight.size(1), weight.size(2));
    });
    return engine(able == names.end() ? names.back() : *able);
  }

  /// The engine of that name, made once. Others are alive while they are measured only: they hold
  /// streams and workspaces.
  GroupedGemmEngine& engine(const std::string& name) {
    const std::lock_guard lock(mutex_);
    auto& kept = engines_[name];
    if (kept == nullptr) {
      kept = make_cuda_engine(device_, name);
    }
    return *kept;
  }

  /// The fastest engine for a product with `weight`; measured with `run` where it is not known.
  GroupedGemmEngine& best(const char* operation, const torch::Tensor& weight, const Counts& counts,
                          const torch::Tensor& rows, const Trials::Run& run) {
    const auto dtype = rows.scalar_type();  // a weight's gradient may be of another
    if (rows.size(0) == 0 || weight.numel() == 0) {
      return best_guess(dtype, weight);
    }
    const auto product =
        c10::str(operation, " ", dtype, " ", weight.size(0), " experts ", weight.size(1), " x ",
                 weight.size(2), ", from ", bucket(rows.size(0)), " rows, skew ", skew(counts));
    auto choice = choices_->find(product);
    if (!choice) {
      const OnDevice stream(rows);
      // Nothing may be waited for while a graph is recorded.
      if (c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None) {
        return best_guess(dtype, weight);
      }
      choice = measure(able_engines(dtype, weight), run, stream);
      if (choice->engine.empty()) {
        choice->engine = best_guess(dtype, weight).name();
      }
      choices_->keep(product, *choice);
    }
    return engine(choice->engine);
  }

  /// The first engine that none is clearly faster than; engines come best guess first. Those that come
  /// near the best are timed for longer. None is chosen where none finds the memory it needs.
  static EngineChoices::Choice measure(Engines engines, const Trials::Run& run,
                                       cudaStream_t stream) {
    constexpr int kRounds = 4;
    constexpr int kFinalRounds = 20;
    constexpr double kNear = 1.1;
    Trials trials(run, stream);
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

  torch::Device device_;
  std::shared_ptr<EngineChoices> choices_;
  std::mutex mutex_;
  std::map<std::string, std::shared_ptr<GroupedGemmEngine>> engines_;  // those chosen so far
};

}  // namespace

std::shared_ptr<GroupedGemmEngine> make_auto_engine(torch::Device device) {
  const c10::cuda::CUDAGuard guard(device);
  return std::make_shared<AutoEngine>(torch::Device(torch::kCUDA, c10::cuda::current_device()));
}

}  // namespace anabranch
