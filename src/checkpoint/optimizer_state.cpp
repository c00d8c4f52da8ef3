#include "checkpoint/optimizer_state.h"

#include <ATen/ATen.h>
#include <anabranch/error.h>
#include <torch/optim/adam.h>
#include <torch/optim/adamw.h>
#include <torch/optim/sgd.h>

#include <typeinfo>

namespace anabranch {
namespace {

using torch::optim::OptimizerOptions;
using torch::optim::OptimizerParamState;

/// Adam and AdamW: classes without a common base, but with equal members.
template <typename Options, typename State>
class AdamState final : public OptimizerState {
 public:
  explicit AdamState(std::string kind) : kind_(std::move(kind)) {}

  std::string kind() const override { return kind_; }

  std::vector<std::string> slots(const OptimizerOptions& options) const override {
    std::vector<std::string> names{kStep, "exp_avg", "exp_avg_sq"};
    if (dynamic_cast<const Options&>(options).amsgrad()) names.emplace_back("max_exp_avg_sq");
    return names;
  }

  ParameterState read(const OptimizerParamState& state) const override {
    const auto& adam = dynamic_cast<const State&>(state);
    ParameterState slots{{kStep, at::scalar_tensor(adam.step(), at::kLong)},
                         {"exp_avg", adam.exp_avg()},
                         {"exp_avg_sq", adam.exp_avg_sq()}};
    if (adam.max_exp_avg_sq().defined()) slots.emplace("max_exp_avg_sq", adam.max_exp_avg_sq());
    return slots;
  }

  std::unique_ptr<OptimizerParamState> make(const ParameterState& slots) const override {
    auto adam = std::make_unique<State>();
    adam->step(slots.at(kStep).template item<int64_t>());
    adam->exp_avg(slots.at("exp_avg"));
    adam->exp_avg_sq(slots.at("exp_avg_sq"));
    const auto largest = slots.find("max_exp_avg_sq");
    if (largest != slots.end()) adam->max_exp_avg_sq(largest->second);
    return adam;
  }

 private:
  std::string kind_;
};

class SgdState final : public OptimizerState {
 public:
  std::string kind() const override { return "SGD"; }

  std::vector<std::string> slots(const OptimizerOptions& options) const override {
    if (dynamic_cast<const torch::optim::SGDOptions&>(options).momentum() == 0) return {};
    return {"momentum_buffer"};
  }

  ParameterState read(const OptimizerParamState& state) const override {
    const auto& sgd = dynamic_cast<const torch::optim::SGDParamState&>(state);
    return {{"momentum_buffer", sgd.momentum_buffer()}};
  }

  std::unique_ptr<OptimizerParamState> make(const ParameterState& slots) const override {
    auto sgd = std::make_unique<torch::optim::SGDParamState>();
    sgd->momentum_buffer(slots.at("momentum_buffer"));
    return sgd;
  }
};

}  // namespace

const OptimizerState& state_of(const torch::optim::Optimizer& optimizer) {
  using namespace torch::optim;
  static const AdamState<torch::optim::AdamWOptions, AdamWParamState> adamw("AdamW");
  static const AdamState<AdamOptions, AdamParamState> adam("Adam");
  static const SgdState sgd;
  if (dynamic_cast<const AdamW*>(&optimizer) != nullptr) return adamw;
  if (dynamic_cast<const Adam*>(&optimizer) != nullptr) return adam;
  if (dynamic_cast<const SGD*>(&optimizer) != nullptr) return sgd;
  throw CheckpointError(
      c10::str("checkpoints hold the state of AdamW, Adam and SGD; this optimizer "
               "is a ",
               c10::demangle(typeid(optimizer).name())));
}

}  // namespace anabranch
