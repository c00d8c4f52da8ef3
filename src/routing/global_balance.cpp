#include "routing/global_balance.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/graph_task.h>

namespace anabranch {

bool is_recomputing() { return torch::autograd::get_current_graph_task_id() != -1; }

torch::Tensor load_of_step(torch::Tensor& before, const torch::Tensor& own, bool training,
                           Communicator* replicas) {
  const torch::NoGradGuard no_grad;
  if (training && is_recomputing()) {
    return before.clone();
  }
  auto all = own.clone();
  if (replicas != nullptr && replicas->size() > 1) {
    replicas->all_reduce(all);
  }
  if (!training) {
    return all;
  }
  before.add_(all);
  return before.clone();
}

torch::Tensor global_balance_loss(const torch::Tensor& mean_probabilities,
                                  const torch::Tensor& load) {
  const auto share = load.to(at::kDouble) / load.sum().clamp_min(1);
  return (share.to(mean_probabilities.scalar_type()) * mean_probabilities).sum() *
         static_cast<double>(load.size(0));
}

}  // namespace anabranch
