#include <ATen/ATen.h>
#include <anabranch/optimizers.h>

#include "checkpoint/optimizer_state.h"
#include "checkpoint/state.h"
#include "kernels/optimizer.h"
#include "optimizers/masters.h"
#include "placement/slices.h"
#include "support/check.h"

namespace anabranch {
namespace {

/// One parameter and what is kept of it.
struct Updated {
  ParallelParameter parameter;
  torch::Tensor master;
  torch::Tensor mean;
  torch::Tensor square;

  /// The number of the first element, counted over all experts.
  int64_t first_element() const {
    const auto& tensor = parameter.tensor;
    const bool has_experts = parameter.is_expert && tensor.size(0) > 0;
    return has_experts ? parameter.first_place * (tensor.numel() / tensor.size(0)) : 0;
  }
};

/// What one launch updates.
struct Piece {
  AdamWTensors tensors;
  int64_t first_element = 0;
};

/// All of it at once; or expert by expert, where the noise of their rounding does not go on from one to the next.
std::vector<Piece> pieces_of(const Updated& updated) {
  const auto& [parameter, master, mean, square] = updated;
  const auto& gradient = parameter.gradient();
  const auto rounded = rounded_of(parameter.tensor);
  if (parameter.placement == nullptr || mean.scalar_type() != at::kBFloat16) {
    return {{{master, gradient, mean, square, rounded}, updated.first_element()}};
  }
  std::vector<Piece> pieces;
  const auto sizes = parameter.tensor.sizes().slice(1);
  for (int64_t local = 0; local < parameter.tensor.size(0); ++local) {
    pieces.push_back({{master[local], gradient[local], mean[local], square[local],
                       rounded.defined() ? rounded[local] : rounded},
                      first_number_of(parameter.held(local), sizes, parameter.cut)});
  }
  return pieces;
}

Updated make_updated(const ParallelParameter& parameter, torch::Dtype state) {
  const auto master = master_of(parameter.tensor);
  const auto type = master.scalar_type() == at::kFloat ? state : master.scalar_type();
  const auto zeros = [&] { return at::zeros_like(master, master.options().dtype(type)); };
  return {parameter, master, zeros(), zeros()};
}

class AdamW final : public ParallelOptimizer {
 public:
  AdamW(const std::vector<ParallelParameter>& parameters, const AdamWOptions& options)
      : options_(options) {
    check_input(options.state == at::kFloat || options.state == at::kBFloat16,
                "AdamW keeps its state in fp32 or bf16, not in ", options.state);
    const at::NoGradGuard no_grad;
    for (const auto& parameter : parameters) {
      updated_.push_back(make_updated(parameter, options.state));
    }
    const auto device = parameters.empty() ? at::kCPU : parameters[0].tensor.device();
    steps_ = at::zeros({}, at::TensorOptions(at::kLong).device(device));
  }

  void step(double learning_rate, const torch::Tensor& scale) override {
    if (updated_.empty()) return;  // nor is it known on which device
    const at::NoGradGuard no_grad;
    steps_.add_(scale.isfinite());
    for (const auto& updated : updated_) {
      const auto& parameter = updated.parameter;
      if (!parameter.gradient().defined()) continue;
      const bool is_matrix = parameter.tensor.dim() > 1;
      for (const auto& [tensors, first_element] : pieces_of(updated)) {
        OptimizerKernels::on(updated.master.device())
            .adamw(tensors,
                   {.learning_rate = learning_rate,
                    .beta1 = options_.beta1,
                    .beta2 = options_.beta2,
                    .epsilon = options_.epsilon,
                    .decay = is_matrix ? options_.weight_decay : 0,
                    .noise_seed = options_.seed ^ hash_of(parameter.name),
                    .first_noise = first_element},
                   scale, steps_);
      }
    }
  }

  std::vector<ParallelParameter> state() const override {
    std::vector<ParallelParameter> tensors;
    for (const auto& [parameter, master, mean, square] : updated_) {
      tensors.push_back(optimizer_tensor(kStep, parameter, steps_));
      tensors.push_back(optimizer_tensor("exp_avg", parameter, mean));
      tensors.push_back(optimizer_tensor("exp_avg_sq", parameter, square));
      if (rounded_of(parameter.tensor).defined()) {
        tensors.push_back(optimizer_tensor("master", parameter, master));
      }
    }
    return tensors;
  }

  std::string name() const override { return "AdamW"; }

 private:
  AdamWOptions options_;
  std::vector<Updated> updated_;
  torch::Tensor steps_;  // [] int64: updates made
};

}  // namespace

std::unique_ptr<ParallelOptimizer> make_adamw(const std::vector<ParallelParameter>& parameters,
                                              const AdamWOptions& options) {
  return std::make_unique<AdamW>(parameters, options);
}

}  // namespace anabranch
