#include <ATen/ATen.h>
#include <anabranch/gradients.h>

#include <algorithm>
#include <cmath>

#include "finished_gradients.h"
#include "kernels/optimizer.h"
#include "support/check.h"

namespace anabranch {
namespace {

torch::Tensor sum_of_squares(const std::vector<torch::Tensor>& gradients,
                             const torch::TensorOptions& options) {
  auto sum = at::zeros({}, options);
  for (const auto& gradient : gradients)
    sum.add_(OptimizerKernels::on(gradient.device()).sum_of_squares(gradient).to(options.device()));
  return sum;
}

/// Throws InputError on every rank unless ranks that hold the same gradients have found the same: [W, 2]
/// of each rank, its experts' and the replicated ones'. One machine's arithmetic may differ from
/// another's in the last digits.
void check_finished(const double* squares, int64_t ranks, int64_t expert_parallel_size) {
  const auto same = [](double one, double other) {
    return !std::isfinite(one) || !std::isfinite(other) ||
           std::abs(one - other) <= 1e-6 * std::max(one, other);
  };
  for (int64_t rank = 0; rank < ranks; ++rank) {
    check_input(
        same(squares[2 * rank + 1], squares[1]), "gradient_norm: rank ", rank,
        "'s gradients of replicated parameters are not those "
        "of rank 0: finish_gradients goes before, and nothing that scales them by a norm of "
        "one rank's own");
    check_input(same(squares[2 * rank], squares[2 * (rank % expert_parallel_size)]),
                "gradient_norm: rank ", rank, "'s gradients of experts are not those of rank ",
                rank % expert_parallel_size,
                ", which holds the same: finish_gradients goes before");
  }
}

/// [W, 2] fp64 on the gradients' device: each rank's sums of squares, its experts' and the replicated ones'.
/// Collective.
torch::Tensor gather_squares(const Gradients& gradients, Communicator& world) {
  const at::NoGradGuard no_grad;
  const auto& first = gradients.experts.empty() ? gradients.replicated : gradients.experts;
  const auto device = first.empty() ? torch::Device(at::kCPU) : first.front().device();
  const auto options = at::TensorOptions(at::kDouble).device(device);
  return world.all_gather(at::stack(
      {sum_of_squares(gradients.experts, options), sum_of_squares(gradients.replicated, options)}));
}

/// [] of these. One group of expert-parallel ranks holds every expert once; replicated ones are rank 0's.
torch::Tensor norm_of(const torch::Tensor& squares, int64_t expert_parallel_size) {
  auto sum = squares[0][1];
  for (int64_t rank = 0; rank < expert_parallel_size; ++rank) sum = sum + squares[rank][0];
  return sum.sqrt();
}

/// Of this rank: those that there are.
Gradients gradients_of(const torch::nn::Module& model, const ParallelGroups& groups) {
  Gradients gradients;
  for (const auto& parameter : parallel_parameters(model, groups)) {
    const auto& gradient = parameter.gradient();
    if (!gradient.defined() || !parameter.tensor.requires_grad()) continue;
    (parameter.is_expert ? gradients.experts : gradients.replicated).push_back(gradient);
  }
  return gradients;
}

}  // namespace

double gradient_norm(const Gradients& gradients, Communicator& world,
                     int64_t expert_parallel_size) {
  const auto gathered = gather_squares(gradients, world).cpu();
  world.check();
  check_finished(gathered.const_data_ptr<double>(), world.size(), expert_parallel_size);
  return norm_of(gathered, expert_parallel_size).item<double>();
}

GradientScale gradient_scale(const Gradients& gradients, double max_norm, Communicator& world,
                             int64_t expert_parallel_size) {
  check_input(max_norm >= 0, "max_norm must not be negative, got ", max_norm);
  const at::NoGradGuard no_grad;
  const auto norm = norm_of(gather_squares(gradients, world), expert_parallel_size);
  const auto nothing = norm - norm;  // or NaN
  return {norm, max_norm > 0 ? (max_norm / norm).clamp_max(1) + nothing : nothing + 1};
}

double gradient_norm(const torch::nn::Module& model, const ParallelGroups& groups) {
  return gradient_norm(gradients_of(model, groups), *groups.world, groups.expert_parallel->size());
}

bool gradients_are_finite(const torch::nn::Module& model, const ParallelGroups& groups) {
  return std::isfinite(gradient_norm(model, groups));
}

double clip_gradient_norm(const Gradients& gradients, double max_norm, Communicator& world,
                          int64_t expert_parallel_size, double loss_scale) {
  check_input(max_norm > 0, "max_norm must be positive, got ", max_norm);
  check_input(loss_scale > 0, "loss_scale must be positive, got ", loss_scale);
  const double norm = gradient_norm(gradients, world, expert_parallel_size) / loss_scale;
  if (!std::isfinite(norm) || norm <= max_norm) return norm;
  const at::NoGradGuard no_grad;
  for (const auto* part : {&gradients.experts, &gradients.replicated}) {
    if (!part->empty()) at::_foreach_mul_(*part, max_norm / norm);
  }
  mark_again(gradients.experts);
  return norm;
}

double clip_gradient_norm(torch::nn::Module& model, double max_norm, const ParallelGroups& groups,
                          std::optional<double> loss_scale) {
  const double norm = clip_gradient_norm(gradients_of(model, groups), max_norm, *groups.world,
                                         groups.expert_parallel->size(), loss_scale.value_or(1));
  check_input(std::isfinite(norm) || loss_scale, "the gradient's norm is ", norm);
  return norm;
}

}  // namespace anabranch
