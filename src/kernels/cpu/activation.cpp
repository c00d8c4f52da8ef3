#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/gelu_backward.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/silu_backward.h>
#include <ATen/ops/threshold_backward.h>

#include "kernels/activation.h"
#include "kernels/cpu/rows_per_task.h"
#include "support/block.h"

// LibTorch's vectorised element-wise operations, applied to blocks of rows that stay in cache and
// are computed in fp32 (fp64 for fp64): one pass over memory, one rounding.

namespace anabranch {
namespace {

constexpr double kQuickGeluSlope = 1.702;

/// What is activated: at most `limit`, where there is one.
torch::Tensor limited_gate(const torch::Tensor& gate, double limit) {
  return limit > 0 ? gate.clamp_max(limit) : gate;
}

/// What the activation is multiplied by in a GLU.
torch::Tensor limited_up(const torch::Tensor& up, const HiddenActivation& of) {
  if (of.limit == 0 && of.offset == 0) {
    return up;
  }
  const auto wide = up.to(at::toOpMathType(up.scalar_type()));
  return (of.limit > 0 ? wide.clamp(-of.limit, of.limit) : wide) + of.offset;
}

torch::Tensor apply(const torch::Tensor& x, Activation activation) {
  switch (activation) {
    case Activation::kGeluTanh:
      return at::gelu(x, "tanh");
    case Activation::kGelu:
      return at::gelu(x);
    case Activation::kRelu:
      return at::relu(x);
    case Activation::kSilu:
      return at::silu(x);
    case Activation::kReluSquared:
      return at::relu(x).square_();
    case Activation::kQuickGelu:
      return at::sigmoid(x * kQuickGeluSlope).mul_(x);
  }
  TORCH_INTERNAL_ASSERT(false, "unknown activation");
}

torch::Tensor apply_backward(const torch::Tensor& dy, const torch::Tensor& x,
                             Activation activation) {
  switch (activation) {
    case Activation::kGeluTanh:
      return at::gelu_backward(dy, x, "tanh");
    case Activation::kGelu:
      return at::gelu_backward(dy, x);
    case Activation::kRelu:
      return at::threshold_backward(dy, x, 0);
    case Activation::kSilu:
      return at::silu_backward(dy, x);
    case Activation::kReluSquared:
      return at::relu(x).mul_(2).mul_(dy);
    case Activation::kQuickGelu: {
      const auto s = at::sigmoid(x * kQuickGeluSlope);
      return (1 - s).mul_(x).mul_(kQuickGeluSlope).add_(1).mul_(s).mul_(dy);
    }
  }
  TORCH_INTERNAL_ASSERT(false, "unknown activation");
}

/// Calls `body(first_row, rows)` over blocks of rows, in parallel, outside autograd.
template <typename Body>
void for_each_block(int64_t rows, int64_t width, const Body& body) {
  const int64_t block = rows_per_task(width);
  at::parallel_for(0, (rows + block - 1) / block, 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    for (int64_t i = begin; i < end; ++i) {
      body(i * block, std::min(block, rows - i * block));
    }
  });
}

class CpuActivationKernels final : public ActivationKernels {
 public:
  torch::Tensor activate(const torch::Tensor& hidden, const HiddenActivation& of) const override {
    const Activation activation = of.activation;
    const bool glu = of.glu;
    const int64_t rows = hidden.size(0);
    const int64_t n = glu ? hidden.size(1) / 2 : hidden.size(1);
    torch::Tensor activated = at::empty({rows, n}, hidden.options());
    const auto compute_type = at::toOpMathType(hidden.scalar_type());
    for_each_block(rows, hidden.size(1), [&](int64_t first, int64_t count) {
      const auto gate = rows_of(hidden, first, count, 0, n).to(compute_type);
      auto result = apply(limited_gate(gate, of.limit), activation);
      if (glu) {
        result.mul_(limited_up(rows_of(hidden, first, count, n, n), of));
      }
      rows_of(activated, first, count).copy_(result);
    });
    return activated;
  }

  void activate_backward(torch::Tensor& dactivated, const torch::Tensor& hidden,
                         const torch::Tensor& weights, const HiddenActivation& of,
                         const ActivationGradient& gradient) const override {
    const Activation activation = of.activation;
    const bool glu = of.glu;
    const int64_t rows = dactivated.size(0);
    const int64_t n = dactivated.size(1);
    const auto compute_type = at::toOpMathType(hidden.scalar_type());
    for_each_block(rows, hidden.size(1), [&](int64_t first, int64_t count) {
      const auto whole_gate = rows_of(hidden, first, count, 0, n).to(compute_type);
      const auto gate = limited_gate(whole_gate, of.limit);
      const auto whole_up = glu ? rows_of(hidden, first, count, n, n) : torch::Tensor();
      const auto up = glu ? limited_up(whole_up, of) : torch::Tensor();
      const auto own = rows_of(dactivated, first, count);
      auto dresult = own.to(compute_type, false, true);
      auto activated = apply(gate, activation);
      const auto gated = activated;  // activation(gate), before the product with the up part
      if (glu) {
        activated = gated * up;
      }
      gradient.dweights.narrow(0, first, count).copy_((dresult * activated).sum(1));
      if (weights.defined()) {
        const auto weight = weights.narrow(0, first, count).unsqueeze(1);
        activated = activated * weight;
        dresult.mul_(weight);
      }
      if (glu) {
        auto dup = dresult * gated;
        if (of.limit > 0) dup.masked_fill_(whole_up.abs() > of.limit, 0);
        dresult.mul_(up);
        rows_of(gradient.dhidden, first, count, n, n).copy_(dup);
      }
      if (of.limit > 0) dresult.masked_fill_(whole_gate > of.limit, 0);
      rows_of(gradient.dhidden, first, count, 0, n)
          .copy_(apply_backward(dresult, gate, activation));
      own.copy_(activated);
    });
  }
};

}  // namespace

const ActivationKernels& ActivationKernels::cpu() {
  static const CpuActivationKernels kernels;
  return kernels;
}

}  // namespace anabranch
