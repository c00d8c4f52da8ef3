#include "routing/gate.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/exp2.h>
#include <ATen/ops/frexp.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/stack.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/nn/functional/linear.h>

#include <array>
#include <limits>

#include "kernels/gate.h"
#include "support/block.h"
#include "support/single_backward.h"
#include "support/tensor_list.h"

namespace anabranch {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

bool is_split(const torch::Tensor& x, const torch::Tensor& weight) {
  return x.is_cuda() && x.scalar_type() == torch::kBFloat16 &&
         weight.scalar_type() == torch::kFloat;
}

/// Multiplied as they are, by fp16 parts that LibTorch's operations take.
bool is_half(const torch::Tensor& x, const torch::Tensor& weight) {
  return x.is_cuda() && x.scalar_type() == torch::kFloat16 && weight.scalar_type() == torch::kFloat;
}

/// A view of some of x's rows from row `first` on, of [.., h] or in pieces; without a dispatch, see part_of.
torch::Tensor rows_of(const torch::Tensor& x, int64_t first, at::IntArrayRef sizes,
                      at::IntArrayRef strides) {
  const auto bytes = static_cast<int64_t>(x.element_size());
  return part_of(x, first * x.stride(0) * bytes, x.scalar_type(), sizes, strides);
}

/// dᵀ · x in fp32, of numbers of 16 bits: d [T, 4, E] in the places of kSplitGradient, x [T, h] → [E, h]. The sum over
/// tokens is taken in pieces: cuBLAS 13.1 splits sums over more than 8192 rows among blocks of its own, and then
/// loses some where their number is uneven.
torch::Tensor sum_over_tokens(const torch::Tensor& d, const torch::Tensor& x) {
  constexpr int64_t kPiece = 4096;
  const int64_t pieces = x.size(0) / kPiece;
  const int64_t whole = pieces * kPiece;
  const int64_t experts = d.size(2);
  const int64_t width = 4 * experts;  // of a row of d
  const int64_t h = x.size(1);
  const auto in_places = [&](const torch::Tensor& sums, int64_t count) {
    return part_of(sums, 0, torch::kFloat, {count, 3, experts, h},
                   {3 * experts * h, experts * h, h, 1});
  };
  torch::Tensor rest;
  if (whole < x.size(0) || pieces == 0) {
    const int64_t rows = x.size(0) - whole;
    rest = in_places(at::mm(rows_of(d, whole, {3 * experts, rows}, {1, width}),
                            rows_of(x, whole, {rows, h}, x.strides()), torch::kFloat),
                     1);
  }
  torch::Tensor sums;
  if (pieces > 0) {
    const auto of_d = rows_of(d, 0, {pieces, 3 * experts, kPiece}, {kPiece * width, 1, width});
    const auto of_x =
        rows_of(x, 0, {pieces, kPiece, h}, {kPiece * x.stride(0), x.stride(0), x.stride(1)});
    sums = in_places(at::bmm(of_d, of_x, torch::kFloat), pieces);
  } else {
    std::swap(sums, rest);
  }
  // In places 1, 2, 0 are the three parts, the largest first.
  return GateKernels::on(x.device()).sum_split(sums, rest, {1, 2, 0});
}

GateGradient split_gate_gradient(const torch::Tensor& dlogits, const torch::Tensor& x,
                                 const torch::Tensor& split_weight, bool x_wanted,
                                 bool weight_wanted) {
  const int64_t experts = dlogits.size(2);
  const int64_t h = x.size(1);
  GateGradient gradient;
  if (weight_wanted) {
    gradient.weight = sum_over_tokens(dlogits, x);
  }
  if (x_wanted) {  // rounded to bf16: twice its digits are enough, d0·w0 + d1·w0 + d0·w1
    const auto d =
        part_of(dlogits, 2 * experts, torch::kBFloat16, {x.size(0), 3 * experts}, {4 * experts, 1});
    const auto weights = part_of(split_weight, 0, torch::kBFloat16, {3 * experts, h}, {h, 1});
    gradient.x = at::mm(d, weights);
  }
  return gradient;
}

/// [] the power of two that takes the largest |x| to between 2¹⁴ and 2¹⁵, where three numbers of fp16 hold
/// all digits of fp32, and of much smaller ones as many as lie above 2⁻³⁹ of the largest.
torch::Tensor scale_for(const torch::Tensor& x) {
  if (x.numel() == 0) {
    return at::ones({}, x.options());
  }
  const auto largest = at::linalg_vector_norm(x, std::numeric_limits<double>::infinity());
  return at::exp2(15 - std::get<1>(at::frexp(largest)).to(torch::kFloat));
}

/// fp32 in fp16 numbers whose sum it is, the largest first.
std::array<torch::Tensor, 3> half_parts(torch::Tensor rest) {
  std::array<torch::Tensor, 3> parts;
  for (auto& part : parts) {
    part = rest.to(torch::kFloat16);
    rest = rest - part;
  }
  return parts;
}

torch::Tensor half_product(const torch::Tensor& x, const torch::Tensor& weight) {
  const auto scale = scale_for(weight);
  const auto [first, second, third] = half_parts(weight * scale);
  const auto products = at::mm(x, at::cat({first, second, third}).t(), torch::kFloat);
  return products.view({x.size(0), 3, weight.size(0)}).sum(1) / scale;
}

GateGradient half_gate_gradient(const torch::Tensor& dlogits, const torch::Tensor& x,
                                const torch::Tensor& weight, bool x_wanted, bool weight_wanted) {
  const int64_t experts = weight.size(0);
  GateGradient gradient;
  if (weight_wanted) {
    const auto scale = scale_for(dlogits);
    const auto [first, second, third] = half_parts(dlogits * scale);
    const auto in_places = at::stack({third, first, second, first}, 1);
    gradient.weight = sum_over_tokens(in_places, x) / scale;
  }
  if (x_wanted) {  // bf16 reaches as far as fp32, and twice its digits are enough
    const GateKernels& kernels = GateKernels::on(x.device());
    const auto d = kernels.split(dlogits.contiguous(), kSplitGradient, /*side_by_side=*/true)
                       .view({x.size(0), 4 * experts});
    const auto w = kernels.split(weight.contiguous(), kSplitWeight, /*side_by_side=*/false)
                       .view({4 * experts, x.size(1)});
    gradient.x =
        at::mm(d.narrow(1, experts, 3 * experts), w.narrow(0, 0, 3 * experts), torch::kFloat)
            .to(torch::kFloat16);
  }
  return gradient;
}

/// The tensors that backward needs.
struct SavedOfGate {
  torch::Tensor x;       ///< [T, h]
  torch::Tensor weight;  ///< [E, h]
  torch::Tensor split_weight;

  auto tensors() { return std::tie(x, weight, split_weight); }
};

/// Exact products of numbers of 16 bits, summed in fp32.
struct SplitGate : torch::autograd::Function<SplitGate> {
  static torch::Tensor forward(AutogradContext* context, const torch::Tensor& x,
                               const torch::Tensor& weight) {
    const auto [parts, split_weight] = gate_product(x, weight);
    context->save_for_backward(pack(SavedOfGate{x, weight, split_weight}));
    return parts.dim() == 3 ? GateKernels::on(x.device()).sum_parts(parts) : parts;
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    refuse_double_backward("router");
    const torch::NoGradGuard no_grad;
    const auto [x, weight, split_weight] = unpack<SavedOfGate>(context->get_saved_variables());
    auto dlogits = gradients[0].contiguous();
    if (split_weight.defined()) {
      dlogits = GateKernels::on(x.device()).split(dlogits, kSplitGradient, /*side_by_side=*/true);
    }
    auto [dx, dweight] = gate_gradient(dlogits, x, weight, split_weight,
                                       context->needs_input_grad(0), context->needs_input_grad(1));
    return {std::move(dx), std::move(dweight)};
  }
};

}  // namespace

torch::Tensor gate_logits(const torch::Tensor& x, const torch::Tensor& weight) {
  if (is_split(x, weight) || is_half(x, weight)) {
    return SplitGate::apply(x, weight);
  }
  return torch::linear(x.to(weight.scalar_type()), weight);
}

GateProduct gate_product(const torch::Tensor& x, const torch::Tensor& weight) {
  if (is_half(x, weight)) {
    return {half_product(x, weight), {}};
  }
  if (!is_split(x, weight)) {
    return {torch::linear(x.to(weight.scalar_type()), weight), {}};
  }
  const int64_t experts = weight.size(0);
  const int64_t h = weight.size(1);
  const auto split =
      GateKernels::on(x.device()).split(weight.contiguous(), kSplitWeight, /*side_by_side=*/false);
  const auto all =  // places 1, 2, 3, transposed
      part_of(split, 2 * experts * h, torch::kBFloat16, {h, 3 * experts}, {1, h});
  const auto products = at::mm(x, all, torch::kFloat);
  return {part_of(products, 0, torch::kFloat, {x.size(0), 3, experts}, {3 * experts, experts, 1}),
          split};
}

GateGradient gate_gradient(const torch::Tensor& dlogits, const torch::Tensor& x,
                           const torch::Tensor& weight, const torch::Tensor& split_weight,
                           bool x_wanted, bool weight_wanted) {
  if (split_weight.defined()) {
    return split_gate_gradient(dlogits, x, split_weight, x_wanted, weight_wanted);
  }
  if (is_half(x, weight)) {
    return half_gate_gradient(dlogits, x, weight, x_wanted, weight_wanted);
  }
  GateGradient gradient;
  if (weight_wanted) {
    gradient.weight = dlogits.t().mm(x.to(weight.scalar_type()));
  }
  if (x_wanted) {
    gradient.x = dlogits.mm(weight).to(x.scalar_type());
  }
  return gradient;
}

}  // namespace anabranch
