#include <ATen/ops/empty.h>

#include <limits>

#include "kernels/activation.h"
#include "kernels/cuda/experts/activation.h"
#include "kernels/cuda/tensors.h"

namespace anabranch {
namespace {

cuda::ActivationArguments arguments_for(const torch::Tensor& hidden, const HiddenActivation& of,
                                        int64_t rows, int64_t width) {
  return {cuda::scalar_of(hidden),
          cuda::kind_of(of.activation),
          of.glu,
          rows,
          width,
          of.limit > 0 ? of.limit : std::numeric_limits<double>::infinity(),
          of.offset};
}

class CudaActivationKernels final : public ActivationKernels {
 public:
  torch::Tensor activate(const torch::Tensor& hidden, const HiddenActivation& of) const override {
    const OnDevice stream(hidden);
    const int64_t rows = hidden.size(0);
    const int64_t n = of.glu ? hidden.size(1) / 2 : hidden.size(1);
    torch::Tensor activated = at::empty({rows, n}, hidden.options());
    cuda::launch_activate(arguments_for(hidden, of, rows, n), hidden.const_data_ptr(),
                          activated.data_ptr(), stream);
    return activated;
  }

  void activate_backward(torch::Tensor& dactivated, const torch::Tensor& hidden,
                         const torch::Tensor& weights, const HiddenActivation& of,
                         const ActivationGradient& gradient) const override {
    const OnDevice stream(hidden);
    cuda::launch_activate_backward(
        arguments_for(hidden, of, dactivated.size(0), dactivated.size(1)),
        dactivated.const_data_ptr(), hidden.const_data_ptr(), cuda::address_or_null(weights),
        gradient.dhidden.data_ptr(), dactivated.data_ptr(), gradient.dweights.data_ptr(), stream);
  }
};

}  // namespace

const ActivationKernels& ActivationKernels::cuda() {
  static const CudaActivationKernels kernels;
  return kernels;
}

}  // namespace anabranch
