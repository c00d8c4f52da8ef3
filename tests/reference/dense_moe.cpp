#include "reference/dense_moe.h"

#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

namespace anabranch::reference {

TopK top_k_of_softmax(const torch::Tensor& logits, int64_t top_k, bool renormalize) {
  const auto largest =
      logits.size(0) == 0 ? logits.new_zeros({0, 1}) : logits.detach().amax(1, /*keepdim=*/true);
  const auto exponentials = (logits - largest).exp();
  const auto probabilities = exponentials / exponentials.sum(1, /*keepdim=*/true);
  // A stable descending sort keeps equal probabilities in the order of their experts.
  const auto order =
      std::get<1>(probabilities.detach().sort(/*stable=*/true, /*dim=*/1, /*descending=*/true));
  const auto expert_ids = order.slice(1, 0, top_k).contiguous();
  auto weights = probabilities.gather(1, expert_ids);
  if (renormalize) {
    weights = weights / weights.sum(1, /*keepdim=*/true);
  }
  return {probabilities, expert_ids, weights};
}

namespace {

torch::Tensor load_of(const torch::Tensor& expert_ids, int64_t num_experts) {
  return torch::stack([&] {
    std::vector<torch::Tensor> counts;
    for (int64_t e = 0; e < num_experts; ++e) {
      counts.push_back(expert_ids.eq(e).sum());
    }
    return counts;
  }());
}

torch::Tensor row_of(const torch::Tensor& stacked, int64_t index) {
  return stacked.defined() ? stacked[index] : torch::Tensor();
}

}  // namespace

torch::Tensor balance_loss(const torch::Tensor& probabilities, const torch::Tensor& expert_ids) {
  const auto tokens = probabilities.size(0);
  const auto num_experts = probabilities.size(1);
  if (tokens == 0) {
    return probabilities.sum();
  }
  const auto fraction = load_of(expert_ids, num_experts).to(probabilities.scalar_type()) /
                        static_cast<double>(expert_ids.numel());
  return static_cast<double>(num_experts) * (fraction * probabilities.mean(0)).sum();
}

torch::Tensor z_loss(const torch::Tensor& logits) {
  if (logits.size(0) == 0) {
    return logits.sum();
  }
  const auto largest = logits.detach().amax(1);
  const auto log_sum = largest + (logits - largest.unsqueeze(1)).exp().sum(1).log();
  return log_sum.square().mean();
}

torch::Tensor activation(const torch::Tensor& x, Activation kind) {
  switch (kind) {
    case Activation::kGeluTanh:
      return 0.5 * x * (1 + (std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)).tanh());
    case Activation::kGelu:
      return 0.5 * x * (1 + (x * M_SQRT1_2).erf());
    case Activation::kRelu:
      return torch::where(x > 0, x, torch::zeros_like(x));
    case Activation::kSilu:
      return x / (1 + (-x).exp());
    case Activation::kReluSquared:
      return torch::where(x > 0, x * x, torch::zeros_like(x));
    case Activation::kQuickGelu:
      return x / (1 + (-1.702 * x).exp());
  }
  throw std::invalid_argument("unknown activation");
}

torch::Tensor expert(const torch::Tensor& x, const torch::Tensor& up_weight,
                     const torch::Tensor& up_bias, const torch::Tensor& down_weight,
                     const torch::Tensor& down_bias, Activation kind, bool glu, bool linear) {
  const auto apply = [&](const torch::Tensor& z) { return linear ? z : activation(z, kind); };
  auto hidden = x.matmul(up_weight.t());
  if (up_bias.defined()) {
    hidden = hidden + up_bias;
  }
  torch::Tensor activated;
  if (glu) {
    const auto inner = hidden.size(1) / 2;
    activated = apply(hidden.slice(1, 0, inner)) * hidden.slice(1, inner, 2 * inner);
  } else {
    activated = apply(hidden);
  }
  auto result = activated.matmul(down_weight.t());
  return down_bias.defined() ? result + down_bias : result;
}

torch::Tensor DenseMoE::mix(const torch::Tensor& x, const torch::Tensor& expert_ids,
                            const torch::Tensor& weights) const {
  const auto num_experts = up_weight.size(0);
  // [T, E]: the weight of each pair, zero where the token does not go.
  const auto dense =
      torch::zeros({x.size(0), num_experts}, weights.options()).scatter(1, expert_ids, weights);
  auto output = torch::zeros_like(x);
  for (int64_t e = 0; e < num_experts; ++e) {
    output = output + dense.select(1, e).unsqueeze(1) * expert(x, up_weight[e], row_of(up_bias, e),
                                                               down_weight[e], row_of(down_bias, e),
                                                               activation, glu, linear);
  }
  if (shared_up_weight.defined()) {
    auto shared = expert(x, shared_up_weight[0], row_of(shared_up_bias, 0), shared_down_weight[0],
                         row_of(shared_down_bias, 0), activation, glu, linear);
    if (shared_gate.defined()) {
      const auto logits = x.matmul(shared_gate.t());
      shared = shared * (linear ? 1 + logits : 1 / (1 + (-logits).exp()));
    }
    output = output + shared;
  }
  return output;
}

DenseMoE::Result DenseMoE::forward(const torch::Tensor& x) const {
  const auto logits = x.matmul(gate.t());
  const auto chosen = choose(logits, routing);
  return {mix(x, chosen.expert_ids, chosen.weights),
          reference::balance_loss(chosen.probabilities, chosen.expert_ids),
          reference::z_loss(logits),
          chosen.expert_ids,
          chosen.weights,
          load_of(chosen.expert_ids, gate.size(0))};
}

DenseMoE::Result DenseMoE::forward(const torch::Tensor& x, const torch::Tensor& expert_ids,
                                   const torch::Tensor& weights) const {
  return {mix(x, expert_ids, weights),           {}, {}, expert_ids, weights,
          load_of(expert_ids, up_weight.size(0))};
}

double DenseMoE::margin(const torch::Tensor& x, bool with_gate) const {
  const torch::NoGradGuard no_grad;
  double smallest = std::numeric_limits<double>::infinity();
  if (x.size(0) == 0) {
    return smallest;
  }
  if (with_gate) {
    smallest = choose(x.matmul(gate.t()), routing).margin.min().item<double>();
  }
  const auto hidden_margin = [&](const torch::Tensor& weights, const torch::Tensor& biases) {
    for (int64_t e = 0; weights.defined() && e < weights.size(0); ++e) {
      auto hidden = x.matmul(weights[e].t());
      hidden = biases.defined() ? hidden + biases[e] : hidden;
      const auto gates = glu ? hidden.slice(1, 0, hidden.size(1) / 2) : hidden;
      smallest = std::min(smallest, gates.abs().min().item<double>());
    }
  };
  if (activation == Activation::kRelu) {
    hidden_margin(up_weight, up_bias);
    hidden_margin(shared_up_weight, shared_up_bias);
  }
  return smallest;
}

}  // namespace anabranch::reference
