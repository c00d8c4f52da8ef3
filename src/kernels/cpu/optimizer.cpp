#include "kernels/optimizer.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <bit>
#include <cmath>

#include "kernels/stochastic_rounding.h"

namespace anabranch {
namespace {

/// bf16 `target` from fp32 `values`; `shift`: which 16 of an element's 64 random bits.
void store_stochastically(torch::Tensor& target, const torch::Tensor& values,
                          const AdamWFactors& factors, int64_t step, int shift) {
  const auto* from = values.const_data_ptr<float>();
  auto* to = reinterpret_cast<uint16_t*>(target.mutable_data_ptr<at::BFloat16>());
  constexpr int64_t kGrain = 1 << 15;
  at::parallel_for(0, values.numel(), kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto noise = noise_of(factors.noise_seed, step, factors.first_noise + i) >> shift;
      to[i] = static_cast<uint16_t>(
          round_stochastically(std::bit_cast<uint32_t>(from[i]), static_cast<uint32_t>(noise)));
    }
  });
}

class CpuOptimizerKernels final : public OptimizerKernels {
 public:
  void adamw(const AdamWTensors& tensors, const AdamWFactors& factors, const torch::Tensor& scale,
             const torch::Tensor& steps) const override {
    const at::NoGradGuard no_grad;
    const double factor = scale.item<double>();
    if (!std::isfinite(factor)) return;
    const auto step = steps.item<int64_t>();
    auto [master, gradient, mean, square, rounded] = tensors;
    const bool reduced = mean.scalar_type() != master.scalar_type();
    auto exact_mean = reduced ? mean.to(master.scalar_type()) : mean;
    auto exact_square = reduced ? square.to(master.scalar_type()) : square;
    if (factor != 1) gradient = gradient * factor;

    if (factors.decay != 0) master.mul_(1 - factors.learning_rate * factors.decay);
    exact_mean.mul_(factors.beta1).add_(gradient, 1 - factors.beta1);
    exact_square.mul_(factors.beta2).addcmul_(gradient, gradient, 1 - factors.beta2);
    const double mean_correction = 1 - std::pow(factors.beta1, static_cast<double>(step));
    const double square_correction = 1 - std::pow(factors.beta2, static_cast<double>(step));
    const auto root = (exact_square.sqrt() / std::sqrt(square_correction)).add_(factors.epsilon);
    master.addcdiv_(exact_mean, root, -(factors.learning_rate / mean_correction));

    if (reduced) {
      store_stochastically(mean, exact_mean, factors, step, 0);
      store_stochastically(square, exact_square, factors, step, 16);
    }
    if (rounded.defined()) rounded.copy_(master);
  }

  /// In pieces, so that the fp64 copy stays small.
  torch::Tensor sum_of_squares(const torch::Tensor& x) const override {
    constexpr int64_t kPiece = int64_t{1} << 22;
    const auto flat = x.reshape({-1});
    auto sum = at::zeros({}, x.options().dtype(at::kDouble));
    for (int64_t start = 0; start < flat.numel(); start += kPiece) {
      const auto length = std::min(kPiece, flat.numel() - start);
      sum.add_(flat.narrow(0, start, length).to(at::kDouble).square().sum());
    }
    return sum;
  }
};

}  // namespace

const OptimizerKernels& OptimizerKernels::cpu() {
  static const CpuOptimizerKernels kernels;
  return kernels;
}

}  // namespace anabranch
