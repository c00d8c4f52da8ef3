#include <ATen/ATen.h>
#include <anabranch/optimizers.h>

#include <algorithm>
#include <cmath>

#include "checkpoint/optimizer_state.h"
#include "checkpoint/state.h"
#include "optimizers/masters.h"
#include "support/check.h"

namespace anabranch {
namespace {

constexpr double kStepSize = 0.2;  // times √max(m, n): the root mean square of AdamW's usual steps

/// One parameter, what is kept of it, and how it is cut into matrices.
struct UpdatedMatrix {
  ParallelParameter parameter;
  int64_t parts;
  torch::Tensor master;
  torch::Tensor momentum;
};

/// [.., m, n] as [count, m / parts, n].
torch::Tensor matrices_of(const torch::Tensor& tensor, int64_t parts) {
  return tensor.reshape({-1, tensor.size(-2) / parts, tensor.size(-1)});
}

class Muon final : public ParallelOptimizer {
 public:
  Muon(const std::vector<MuonParameter>& matrices, const std::vector<ParallelParameter>& others,
       const MuonOptions& options)
      : options_(options), others_(make_adamw(others, options.adamw)) {
    const at::NoGradGuard no_grad;
    auto device = others.empty() ? torch::Device(at::kCPU) : others[0].tensor.device();
    for (const auto& [parameter, parts] : matrices) {
      const auto& tensor = parameter.tensor;
      check_input(tensor.dim() >= 2 && parts > 0 && tensor.size(-2) % parts == 0, parameter.name,
                  " of shape ", tensor.sizes(), " is not made of ", parts, " matrices");
      check_input(
          !parameter.in_slices(), parameter.name,
          " lies in slices: Muon takes a matrix as a whole, expected AdamW or whole experts");
      const auto master = master_of(tensor);
      updated_.push_back({parameter, parts, master, at::zeros_like(master)});
      device = tensor.device();
    }
    steps_ = at::zeros({}, at::TensorOptions(at::kLong).device(device));
  }

  void step(double learning_rate, const torch::Tensor& scale) override {
    const at::NoGradGuard no_grad;
    const auto finite = scale.isfinite();
    if (!updated_.empty()) steps_.add_(finite);
    for (auto& updated : updated_) {
      if (updated.parameter.gradient().defined()) {
        update(updated, learning_rate, scale, finite);
      }
    }
    others_->step(learning_rate, scale);
  }

  std::vector<ParallelParameter> state() const override {
    auto tensors = others_->state();
    for (const auto& [parameter, parts, master, momentum] : updated_) {
      tensors.push_back(optimizer_tensor(kStep, parameter, steps_));
      tensors.push_back(optimizer_tensor("momentum_buffer", parameter, momentum));
      if (rounded_of(parameter.tensor).defined()) {
        tensors.push_back(optimizer_tensor("master", parameter, master));
      }
    }
    return tensors;
  }

  std::string name() const override { return "Muon"; }

 private:
  /// Everything stays as it is unless `finite` [] bool, which the host does not read.
  void update(UpdatedMatrix& updated, double learning_rate, const torch::Tensor& scale,
              const torch::Tensor& finite) const {
    auto& [parameter, parts, master, momentum] = updated;
    const auto gradient = parameter.gradient() * scale.to(master.scalar_type());
    const auto sum = momentum * options_.momentum + gradient;
    momentum.copy_(at::where(finite, sum, momentum));
    const auto direction = matrices_of(gradient + sum * options_.momentum, parts);
    const auto size = static_cast<double>(std::max(direction.size(-2), direction.size(-1)));
    const auto change = orthogonalized(direction, options_.iterations)
                            .view(master.sizes())
                            .mul_(kStepSize * std::sqrt(size))
                            .add_(master, options_.weight_decay);
    master.copy_(at::where(finite, master - change * learning_rate, master));
    if (auto rounded = rounded_of(parameter.tensor); rounded.defined()) rounded.copy_(master);
  }

  MuonOptions options_;
  std::vector<UpdatedMatrix> updated_;
  torch::Tensor steps_;  // [] int64: updates made
  std::unique_ptr<ParallelOptimizer> others_;
};

}  // namespace

torch::Tensor orthogonalized(const torch::Tensor& matrices, int64_t iterations) {
  check_input(matrices.dim() >= 2 && matrices.is_floating_point(),
              "orthogonalized: expected matrices [.., m, n], got ", matrices.scalar_type(), " ",
              matrices.sizes());
  check_input(iterations > 0, "orthogonalized: iterations must be positive, got ", iterations);
  const at::NoGradGuard no_grad;
  if (matrices.numel() == 0) return matrices.clone();
  const auto given = matrices.scalar_type();
  const auto type = given == at::kDouble ? given : matrices.is_cuda() ? at::kBFloat16 : at::kFloat;
  const bool is_tall = matrices.size(-2) > matrices.size(-1);
  const auto wide = is_tall ? matrices.transpose(-2, -1) : matrices;
  // Norms before anything is rounded; a number too small to divide by makes nothing of nothing.
  const auto norm = at::linalg_matrix_norm(wide.to(given == at::kDouble ? given : at::kFloat),
                                           "fro", {-2, -1}, /*keepdim=*/true);
  auto x = (wide / (norm + 1e-7)).to(type).reshape({-1, wide.size(-2), wide.size(-1)});
  constexpr double kA = 3.4445, kB = -4.7750, kC = 2.0315;
  for (int64_t i = 0; i < iterations; ++i) {
    const auto gram = x.bmm(x.transpose(1, 2));
    x = at::baddbmm(x, at::baddbmm(gram, gram, gram, kB, kC), x, kA, 1);
  }
  x = x.view(wide.sizes());
  return (is_tall ? x.transpose(-2, -1) : x).to(given).contiguous();
}

std::unique_ptr<ParallelOptimizer> make_muon(const std::vector<MuonParameter>& matrices,
                                             const std::vector<ParallelParameter>& others,
                                             const MuonOptions& options) {
  return std::make_unique<Muon>(matrices, others, options);
}

}  // namespace anabranch
