#include "kernels/cuda/optimizer.h"

#include <ATen/ATen.h>

#include "kernels/cuda/tensors.h"
#include "kernels/optimizer.h"

namespace anabranch {
namespace {

class CudaOptimizerKernels final : public OptimizerKernels {
 public:
  void adamw(const AdamWTensors& tensors, const AdamWFactors& factors, const torch::Tensor& scale,
             const torch::Tensor& steps) const override {
    const auto& [master, gradient, mean, square, rounded] = tensors;
    const OnDevice stream(master);
    const auto rounded_scalar =
        rounded.defined() ? cuda::scalar_of(rounded) : cuda::Scalar::kBFloat16;
    cuda::launch_adamw(
        cuda::scalar_of(master), cuda::scalar_of(mean), rounded_scalar,
        {master.mutable_data_ptr(), gradient.const_data_ptr(), mean.mutable_data_ptr(),
         square.mutable_data_ptr(), rounded.defined() ? rounded.mutable_data_ptr() : nullptr},
        master.numel(),
        {factors.learning_rate, factors.beta1, factors.beta2, factors.epsilon, factors.decay,
         factors.noise_seed, factors.first_noise, scale.const_data_ptr<double>(),
         steps.const_data_ptr<int64_t>()},
        stream);
  }

  torch::Tensor sum_of_squares(const torch::Tensor& x) const override {
    const OnDevice stream(x);
    const auto values = x.contiguous();
    const auto partial =
        at::empty({cuda::square_partials(values.numel())}, x.options().dtype(at::kDouble));
    cuda::launch_sum_of_squares(cuda::scalar_of(values), values.const_data_ptr(), values.numel(),
                                partial.mutable_data_ptr<double>(), stream);
    return partial.sum();
  }
};

}  // namespace

const OptimizerKernels& OptimizerKernels::cuda() {
  static const CudaOptimizerKernels kernels;
  return kernels;
}

}  // namespace anabranch
