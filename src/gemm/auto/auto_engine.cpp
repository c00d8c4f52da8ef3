#include "gemm/auto/auto_engine.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>
#include <bit>
#include <map>
#include <mutex>
#include <numeric>

#include "gemm/auto/engine_choices.h"
#include "gemm/auto/measuring.h"
#include "gemm/auto/trials.h"
#include "gemm/engines.h"

namespace anabranch {
namespace {

using Counts = std::vector<int64_t>;

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

class AutoEngine final : public GroupedGemmEngine {
 public:
  AutoEngine(torch::Device device, std::vector<EngineEntry> considered)
      : device_(device), entries_(std::move(considered)), choices_(shared_choices(device)) {}

  std::string name() const override { return "auto"; }
  std::string explain() const override { return choices_->explain(); }

 private:
  void do_forward(const torch::Tensor& x, const torch::Tensor& weight, const Counts& counts,
                  torch::Tensor& y) override {
    const auto run = [&](GroupedGemmEngine& engine) { engine.forward(x, weight, counts, y); };
    run(best("forward", weight, counts, x, run));
  }
  void do_dgrad(const torch::Tensor& dy, const torch::Tensor& weight, const Counts& counts,
                torch::Tensor& dx) override {
    const auto run = [&](GroupedGemmEngine& engine) { engine.dgrad(dy, weight, counts, dx); };
    run(best("dgrad", weight, counts, dy, run));
  }
  void do_wgrad(const torch::Tensor& dy, const torch::Tensor& x, const Counts& counts,
                torch::Tensor& dweight) override {
    const auto run = [&](GroupedGemmEngine& engine) { engine.wgrad(dy, x, counts, dweight); };
    run(best("wgrad", dweight, counts, dy, run));
  }

  void do_wgrad_accumulate(const torch::Tensor& dy, const torch::Tensor& x, const Counts& counts,
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

  torch::Tensor do_forward_activated(const torch::Tensor& x, const torch::Tensor& weight,
                                     const Counts& counts, const HiddenActivation& activation,
                                     torch::Tensor& hidden) override {
    const auto run = [&](GroupedGemmEngine& engine) {
      return engine.forward_activated(x, weight, counts, activation, hidden);
    };
    return run(best(activation.glu ? "forward with GLU" : "forward with activation", weight, counts,
                    x, run));
  }

  void do_dgrad_activated(const torch::Tensor& dy, const torch::Tensor& weight,
                          const Counts& counts, const HiddenActivation& activation,
                          const torch::Tensor& hidden, const torch::Tensor& routing_weights,
                          ActivatedGradient& gradient) override {
    // What is measured more than once must not write over what it reads.
    const auto try_out = [&](GroupedGemmEngine& engine) {
      ActivatedGradient scratch = {at::empty_like(hidden), gradient.drouting_weights, gradient.activated};
      engine.dgrad_activated(dy, weight, counts, activation, hidden, routing_weights, scratch);
    };
    best(activation.glu ? "dgrad with GLU" : "dgrad with activation", weight, counts, dy, try_out)
        .dgrad_activated(dy, weight, counts, activation, hidden, routing_weights, gradient);
  }

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

  /// All that can multiply rows of that type with `weight`.
  Engines able_engines(torch::Dtype dtype, const torch::Tensor& weight) const {
    Engines able;
    for (const EngineEntry& entry : entries_) {
      auto engine = entry.make(device_);
      if (engine->supports(dtype, weight.size(1), weight.size(2))) {
        able.push_back(std::move(engine));
      }
    }
    return able;
  }

  /// Where nothing is measured: the first that can, but of the loops that of four streams.
  GroupedGemmEngine& best_guess(torch::Dtype dtype, const torch::Tensor& weight) {
    for (const char* name : {"hopper", "cublas_loop_4"}) {
      const bool there = std::any_of(entries_.begin(), entries_.end(),
                                     [&](const auto& entry) { return entry.name == name; });
      if (there && engine(name).supports(dtype, weight.size(1), weight.size(2))) {
        return engine(name);
      }
    }
    return engine(entries_.front().name);
  }

  /// The engine of that name, made once. Others are alive while they are measured only: they hold
  /// streams and workspaces.
  GroupedGemmEngine& engine(const std::string& name) {
    const std::lock_guard lock(mutex_);
    auto& kept = engines_[name];
    if (kept == nullptr) {
      kept = make_grouped_gemm_engine(device_, name);
    }
    return *kept;
  }

  /// The fastest engine for a product with `weight`; measured with `run` where it is not known.
  GroupedGemmEngine& best(const char* operation, const torch::Tensor& weight, const Counts& counts,
                          const torch::Tensor& rows, const Run& run) {
    const auto dtype = rows.scalar_type();  // a weight's gradient may be of another
    if (rows.size(0) == 0 || weight.numel() == 0) {
      return best_guess(dtype, weight);
    }
    const auto product =
        c10::str(operation, " ", dtype, " ", weight.size(0), " experts ", weight.size(1), " x ",
                 weight.size(2), ", from ", bucket(rows.size(0)), " rows, skew ", skew(counts));
    auto choice = choices_->find(product);
    if (!choice) {
      const c10::DeviceGuard guard(rows.device());
      // Nothing may be waited for while a graph is recorded.
      if (device_.is_cuda() && is_captured()) {
        return best_guess(dtype, weight);
      }
      choice = fastest(able_engines(dtype, weight), run, rows.device());
      if (choice->engine.empty()) {
        choice->engine = best_guess(dtype, weight).name();
      }
      choices_->keep(product, *choice);
    }
    return engine(choice->engine);
  }

  torch::Device device_;
  std::vector<EngineEntry> entries_;  // those considered
  std::shared_ptr<EngineChoices> choices_;
  std::mutex mutex_;
  std::map<std::string, std::shared_ptr<GroupedGemmEngine>> engines_;  // those chosen so far
};

}  // namespace

std::shared_ptr<GroupedGemmEngine> make_auto_engine(torch::Device device) {
  auto considered = engines_on(device);
  std::erase_if(considered, [](const EngineEntry& entry) { return !entry.considered_by_auto; });
  if (considered.size() == 1) {
    return considered.front().make(device);
  }
  const c10::DeviceGuard guard(device);
  return std::make_shared<AutoEngine>(guard.current_device(), std::move(considered));
}

}  // namespace anabranch
