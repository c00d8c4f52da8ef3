#include "gemm/auto/auto_engine.h"

#include <ATen/Context.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <optional>

#include "gemm/auto/engine_choices.h"
#include "gemm/auto/measuring.h"
#include "gemm/auto/rule.h"
#include "gemm/auto/trials.h"
#include "gemm/engines.h"
#include "support/cuda/capture.h"

namespace anabranch {
namespace {

using Able = EngineChoices::Able;
using Counts = ExpertCounts;

/// Milliseconds that measuring a product may take, once each engine had a turn; and where the choice for
/// another of its kind is known: other ranks may be waiting.
constexpr double kMostSpent = 2000;
constexpr double kMostSpentOnSimilar = 50;
/// Milliseconds that an engine must save for the host to wait for counts that only the GPU knows.
constexpr double kWait = 0.05;

class AutoEngine final : public GroupedGemmEngine {
 public:
  AutoEngine(torch::Device device, std::vector<EngineEntry> considered)
      : device_(device), entries_(std::move(considered)), choices_(shared_choices(device)) {
    for (const EngineEntry& entry : entries_) {
      if (entry.reads_counts_on_gpu) ours_.push_back(entry.make(device));
    }
  }

  std::string name() const override { return "auto"; }
  std::string explain() const override {
    return settled_ ? "choices settled on\n" + settled_->explain() : choices_->explain();
  }
  bool is_settled() const override { return settled_ != nullptr; }
  bool gathers(GatheredRows rows, torch::Dtype dtype, int64_t n, int64_t k) const override {
    return std::any_of(ours_.begin(), ours_.end(),
                       [&](const auto& engine) { return engine->gathers(rows, dtype, n, k); });
  }
  std::string choices() const override { return (settled_ ? settled_ : choices_)->text(); }
  void settle_on(const std::string& choices) override {
    auto settled = std::make_shared<EngineChoices>();
    settled->add(choices);
    settled_ = std::move(settled);
  }

 private:
  void do_forward(const torch::Tensor& x, const torch::Tensor& weight, const Counts& counts,
                  torch::Tensor& y) override {
    const auto run = [&](GroupedGemmEngine& engine) { engine.forward(x, weight, counts, y); };
    run(best("forward", weight, counts, x, run));
  }
  void do_forward_gathering(const ProductRows& x, const torch::Tensor& weight, const Counts& counts,
                            torch::Tensor& y) override {
    const auto run = [&](GroupedGemmEngine& engine) { engine.forward(x, weight, counts, y); };
    run(best("forward, gathered", weight, counts, x.rows, run));
  }
  void do_dgrad(const torch::Tensor& dy, const torch::Tensor& weight, const Counts& counts,
                torch::Tensor& dx) override {
    const auto run = [&](GroupedGemmEngine& engine) { engine.dgrad(dy, weight, counts, dx); };
    run(best("dgrad", weight, counts, dy, run));
  }
  void do_wgrad(const torch::Tensor& dy, const torch::Tensor& x, const Counts& counts,
                torch::Tensor& dweight) override {
    wgrad_by("wgrad", dy, x, counts, dweight);
  }
  void do_wgrad_gathering(const ProductRows& dy, const ProductRows& x, const Counts& counts,
                          torch::Tensor& dweight) override {
    wgrad_by("wgrad, gathered", dy, x, counts, dweight);
  }
  void wgrad_by(const char* operation, const ProductRows& dy, const ProductRows& x,
                const Counts& counts, torch::Tensor& dweight) {
    const auto run = [&](GroupedGemmEngine& engine) { engine.wgrad(dy, x, counts, dweight); };
    run(best(operation, dweight, counts, dy.rows, run));
  }

  void do_wgrad_accumulate(const torch::Tensor& dy, const torch::Tensor& x, const Counts& counts,
                           torch::Tensor& sum) override {
    wgrad_accumulate_by("wgrad, accumulated", dy, x, counts, sum);
  }
  void do_wgrad_accumulate_gathering(const ProductRows& dy, const ProductRows& x,
                                     const Counts& counts, torch::Tensor& sum) override {
    wgrad_accumulate_by("wgrad, accumulated, gathered", dy, x, counts, sum);
  }
  void wgrad_accumulate_by(const char* operation, const ProductRows& dy, const ProductRows& x,
                           const Counts& counts, torch::Tensor& sum) {
    // What is measured more than once must not be added more than once.
    torch::Tensor scratch;
    const auto try_out = [&](GroupedGemmEngine& engine) {
      if (!scratch.defined()) {
        scratch = at::zeros_like(sum);
      }
      engine.wgrad_accumulate(dy, x, counts, scratch);
    };
    best(operation, sum, counts, dy.rows, try_out).wgrad_accumulate(dy, x, counts, sum);
  }

  torch::Tensor do_forward_activated(const torch::Tensor& x, const torch::Tensor& weight,
                                     const Counts& counts, const HiddenActivation& activation,
                                     torch::Tensor& hidden) override {
    return forward_activated_by(activation.glu ? "forward with GLU" : "forward with activation", x,
                                weight, counts, activation, hidden);
  }
  torch::Tensor do_forward_activated_gathering(const ProductRows& x, const torch::Tensor& weight,
                                               const Counts& counts,
                                               const HiddenActivation& activation,
                                               torch::Tensor& hidden) override {
    return forward_activated_by(
        activation.glu ? "forward with GLU, gathered" : "forward with activation, gathered", x,
        weight, counts, activation, hidden);
  }
  torch::Tensor forward_activated_by(const char* operation, const ProductRows& x,
                                     const torch::Tensor& weight, const Counts& counts,
                                     const HiddenActivation& activation, torch::Tensor& hidden) {
    const auto run = [&](GroupedGemmEngine& engine) {
      return engine.forward_activated(x, weight, counts, activation, hidden);
    };
    return run(best(operation, weight, counts, x.rows, run));
  }

  void do_dgrad_activated(const torch::Tensor& dy, const torch::Tensor& weight,
                          const Counts& counts, const HiddenActivation& activation,
                          const torch::Tensor& hidden, const torch::Tensor& routing_weights,
                          ActivatedGradient& gradient) override {
    dgrad_activated_by(activation.glu ? "dgrad with GLU" : "dgrad with activation", dy, weight,
                       counts, activation, hidden, routing_weights, gradient);
  }
  void do_dgrad_activated_gathering(const ProductRows& dy, const torch::Tensor& weight,
                                    const Counts& counts, const HiddenActivation& activation,
                                    const torch::Tensor& hidden,
                                    const torch::Tensor& routing_weights,
                                    ActivatedGradient& gradient) override {
    dgrad_activated_by(
        activation.glu ? "dgrad with GLU, gathered" : "dgrad with activation, gathered", dy, weight,
        counts, activation, hidden, routing_weights, gradient);
  }
  void dgrad_activated_by(const char* operation, const ProductRows& dy, const torch::Tensor& weight,
                          const Counts& counts, const HiddenActivation& activation,
                          const torch::Tensor& hidden, const torch::Tensor& routing_weights,
                          ActivatedGradient& gradient) {
    // What is measured more than once must not write over what it reads.
    const auto try_out = [&](GroupedGemmEngine& engine) {
      ActivatedGradient scratch = {at::empty_like(hidden), gradient.drouting_weights,
                                   gradient.activated};
      engine.dgrad_activated(dy, weight, counts, activation, hidden, routing_weights, scratch);
    };
    best(operation, weight, counts, dy.rows, try_out)
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

  /// Those that can multiply weights [experts, n, k] of that type, less those that were much slower than
  /// the best where products are nearly the same.
  Engines candidates(torch::Dtype dtype, int64_t n, int64_t k, const Product& product) const {
    constexpr double kNear = 3;
    constexpr double kHopeless = 1.5;
    const auto slowness = choices_->slowness(product, kNear);
    Engines engines;
    for (const EngineEntry& entry : entries_) {
      const auto known = slowness.find(entry.name);
      if (known != slowness.end() && known->second > kHopeless) continue;
      auto engine = entry.make(device_);
      if (engine->supports(dtype, n, k)) {
        engines.push_back(std::move(engine));
      }
    }
    return engines;
  }

  /// Where nothing is measured.
  GroupedGemmEngine& by_rule(const Product& product, const Able& able) {
    for (const std::string& name : engines_by_rule(product)) {
      if (able(name)) return engine(name);
    }
    for (const EngineEntry& entry : entries_) {
      if (able(entry.name)) return engine(entry.name);
    }
    return engine(entries_.front().name);  // says what it does not take
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

  /// The engine for a product with `weight`; measured with `run` where it is not known and may be.
  GroupedGemmEngine& best(const char* operation, const torch::Tensor& weight, const Counts& counts,
                          const torch::Tensor& rows, const Run& run) {
    const auto dtype = rows.scalar_type();  // a weight's gradient may be of another
    const int64_t n = weight.size(1);
    const int64_t k = weight.size(2);
    const bool captured = is_captured(rows.device());  // then nothing may be waited for
    const Product product = product_for(operation, dtype, n, k, counts, captured);
    const Able able = [&](const std::string& name) {
      return is_considered(name) && engine(name).supports(dtype, n, k) &&
             (!captured || counts.known_to_host() || reads_counts_there(name));
    };
    if (product.rows == 0 || weight.numel() == 0 || is_to_be_deterministic()) {
      return by_rule(product, able);
    }
    const EngineChoices& known = settled_ ? *settled_ : *choices_;
    auto choice = known.find(product, able);
    if (choice && !counts.known_to_host() && !reads_counts_there(choice->engine)) {
      for (const auto& [name, milliseconds] : choice->milliseconds) {
        if (reads_counts_there(name) && able(name) &&
            milliseconds < choice->milliseconds.at(choice->engine) + kWait) {
          return engine(name);
        }
      }
    }
    if (!choice) {
      const auto similar = known.nearest(product, able);
      const c10::DeviceGuard guard(rows.device());
      if (settled_ || captured) {
        return similar ? engine(similar->engine) : by_rule(product, able);
      }
      choice = fastest(candidates(dtype, n, k, product), run, rows.device(),
                       similar ? kMostSpentOnSimilar : kMostSpent);
      if (choice->engine.empty()) {
        choice->engine = by_rule(product, able).name();
      }
      choice = choices_->keep(product, *choice, able);
    }
    return engine(choice->engine);
  }

  /// Whether PyTorch refuses what is not deterministic.
  static bool is_to_be_deterministic() {
    const at::Context& context = at::globalContext();
    return context.deterministicAlgorithms() && !context.deterministicAlgorithmsWarnOnly();
  }

  bool is_considered(const std::string& name) const {
    return std::any_of(entries_.begin(), entries_.end(),
                       [&](const EngineEntry& entry) { return entry.name == name; });
  }

  bool reads_counts_there(const std::string& name) const {
    return std::any_of(entries_.begin(), entries_.end(), [&](const EngineEntry& entry) {
      return entry.name == name && entry.reads_counts_on_gpu;
    });
  }

  /// Where only a GPU knows the counts, they are taken to be as skewed as when the host last knew those of
  /// a product of the same sizes; of the first it asks, unless a graph is recorded.
  Product product_for(const char* operation, torch::Dtype dtype, int64_t n, int64_t k,
                      const Counts& counts, bool captured) {
    Product product = product_of(operation, dtype, n, k, counts.experts(), counts.rows());
    const std::lock_guard lock(mutex_);
    auto& skew = skews_[product];
    if (counts.known_to_host() || (!skew && !captured)) {
      skew = skew_of(counts.on_host());
    }
    product.skew = skew.value_or(0);
    return product;
  }

  torch::Device device_;
  std::vector<EngineEntry> entries_;  // those considered
  std::vector<std::shared_ptr<GroupedGemmEngine>>
      ours_;  // of these, those with a kernel of our own
  std::shared_ptr<EngineChoices> choices_;
  std::shared_ptr<EngineChoices> settled_;  // these alone, where there are any
  std::mutex mutex_;
  std::map<std::string, std::shared_ptr<GroupedGemmEngine>> engines_;  // those chosen so far
  std::map<Product, std::optional<int>> skews_;                        // of products without theirs
};

}  // namespace

std::shared_ptr<GroupedGemmEngine> make_auto_engine(torch::Device device) {
  auto considered = engines_on(device);
  std::erase_if(considered, [all = considered](const EngineEntry& entry) {
    return !entry.considered_by_auto || std::any_of(all.begin(), all.end(), [&](const auto& other) {
      return other.name == entry.outdone_by;
    });
  });
  if (considered.size() == 1) {
    return considered.front().make(device);
  }
  const c10::DeviceGuard guard(device);
  return std::make_shared<AutoEngine>(guard.current_device(), std::move(considered));
}

}  // namespace anabranch
