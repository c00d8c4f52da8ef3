#include "routing/gate.h"

#include <torch/csrc/autograd/custom_function.h>
#include <torch/nn/functional/linear.h>

namespace anabranch {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// fp32 has three times the digits of bf16.
constexpr int64_t kParts = 3;

/// x fp32 [m, n] as the sum of bf16 tensors, the largest first.
std::vector<torch::Tensor> split(const torch::Tensor& x) {
  std::vector<torch::Tensor> parts;
  auto rest = x;
  for (int64_t i = 0; i < kParts; ++i) {
    parts.push_back(rest.to(torch::kBFloat16));
    if (i + 1 < kParts) {
      rest = rest - parts.back();
    }
  }
  return parts;
}

/// Exact products of bf16 numbers, summed in fp32.
struct SplitGate : torch::autograd::Function<SplitGate> {
  static torch::Tensor forward(AutogradContext* context, const torch::Tensor& x,
                               const torch::Tensor& weight) {
    context->save_for_backward({x, weight});
    const auto parts = at::mm(x, torch::cat(split(weight)).t(), torch::kFloat);
    return parts.view({x.size(0), kParts, weight.size(0)}).sum(1);
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const torch::NoGradGuard no_grad;
    const auto saved = context->get_saved_variables();
    const auto& x = saved[0];
    const auto& weight = saved[1];
    const auto dlogits = split(gradients[0]);
    const auto dweight =
        at::mm(torch::cat(dlogits, 1).t(), x, torch::kFloat).view({kParts, -1, x.size(1)}).sum(0);
    // dx is rounded to bf16: twice its digits are enough.
    const auto weights = split(weight);
    const auto dx = at::mm(torch::cat({dlogits[0], dlogits[1], dlogits[0]}, 1),
                           torch::cat({weights[0], weights[0], weights[1]}));
    return {dx, dweight};
  }
};

}  // namespace

torch::Tensor gate_logits(const torch::Tensor& x, const torch::Tensor& weight) {
  if (x.is_cuda() && x.scalar_type() == torch::kBFloat16 && weight.scalar_type() == torch::kFloat) {
    return SplitGate::apply(x, weight);
  }
  return torch::linear(x.to(weight.scalar_type()), weight);
}

}  // namespace anabranch
