#include "routing/gate.h"

#include <torch/csrc/autograd/custom_function.h>
#include <torch/nn/functional/linear.h>

#include "kernels/gate.h"
#include "support/single_backward.h"
#include "support/tensor_list.h"

namespace anabranch {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// GateKernels::split as one matrix: fp32 has three times the digits of bf16.
torch::Tensor split(const torch::Tensor& x, const std::array<int, 3>& parts, bool side_by_side) {
  const auto places = GateKernels::on(x.device()).split(x.contiguous(), parts, side_by_side);
  return side_by_side ? places.view({x.size(0), 3 * x.size(1)})
                      : places.view({3 * x.size(0), x.size(1)});
}

/// dᵀ · x in fp32, of bf16 numbers; d [T, m], x [T, n] → [m, n]. The sum over tokens is taken in parts:
/// cuBLAS 13.1 splits sums over more than 8192 rows among blocks of its own, and then loses some where
/// their number is uneven.
torch::Tensor sum_over_tokens(const torch::Tensor& d, const torch::Tensor& x) {
  constexpr int64_t kPart = 4096;
  const int64_t parts = x.size(0) / kPart;
  const int64_t whole = parts * kPart;
  const auto rest = [&] { return at::mm(d.slice(0, whole).t(), x.slice(0, whole), torch::kFloat); };
  if (parts == 0) {
    return rest();
  }
  const auto in_parts = [&](const torch::Tensor& rows) {
    return rows.slice(0, 0, whole).view({parts, kPart, rows.size(1)});
  };
  const auto sums = at::bmm(in_parts(d).transpose(1, 2), in_parts(x), torch::kFloat);
  return whole == x.size(0) ? sums.sum(0) : sums.sum(0).add_(rest());
}

/// The tensors that backward needs.
struct Saved {
  torch::Tensor x;       ///< [T, h]
  torch::Tensor weight;  ///< [E, h]

  auto tensors() { return std::tie(x, weight); }
};

/// Exact products of bf16 numbers, summed in fp32.
struct SplitGate : torch::autograd::Function<SplitGate> {
  static torch::Tensor forward(AutogradContext* context, const torch::Tensor& x,
                               const torch::Tensor& weight) {
    context->save_for_backward(pack(Saved{x, weight}));
    const auto parts = at::mm(x, split(weight, {0, 1, 2}, false).t(), torch::kFloat);
    return parts.view({x.size(0), 3, weight.size(0)}).sum(1);
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    refuse_double_backward("router");
    const torch::NoGradGuard no_grad;
    const auto [x, weight] = unpack<Saved>(context->get_saved_variables());
    const auto& dlogits = gradients[0];
    const auto dweight = sum_over_tokens(split(dlogits, {0, 1, 2}, true), x)
                             .view({3, weight.size(0), x.size(1)})
                             .sum(0);
    // dx is rounded to bf16: twice its digits are enough, d0·w0 + d1·w0 + d0·w1.
    const auto dx = at::mm(split(dlogits, {0, 1, 0}, true), split(weight, {0, 0, 1}, false));
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
