#include <ATen/ops/empty.h>

#include "kernels/activation.h"
#include "kernels/cuda/activation.h"
#include "kernels/cuda/tensors.h"

namespace anabranch {
namespace {

class CudaActivationKernels final : public ActivationKernels {
 public:
  torch::Tensor activate(const torch::Tensor& hidden, const HiddenActivation& of) const override {
    const Activation activation = of.activation;
    const bool glu = of.glu;
    const OnDevice stream(hidden);
    const int64_t rows = hidden.size(0);
    const int64_t n = glu ? hidden.size(1) / 2 : hidden.size(1);
    torch::Tensor activated = at::empty({rows, n}, hidden.options());
    cuda::launch_activate({cuda::scalar_of(hidden), cuda::kind_of(activation), glu, rows, n},
                          hidden.const_data_ptr(), activated.data_ptr(), stream);
    return activated;
  }

  void activate_backward(torch::Tensor& dactivated, const torch::Tensor& hidden,
                         const torch::Tensor& weights, const HiddenActivation& of,
                         const ActivationGradient& gradient) const override {
    const Activation activation = of.activation;
    const bool glu = of.glu;
    const OnDevice stream(hidden);
    cuda::launch_activate_backward({cuda::scalar_of(hidden), cuda::kind_of(activation), glu,
                                    dactivated.size(0), dactivated.size(1)},
                                   dactivated.const_data_ptr(), hidden.const_data_ptr(),
                                   cuda::address_or_null(weights), gradient.dhidden.data_ptr(),
                                   dactivated.data_ptr(), gradient.dweights.data_ptr(), stream);
  }
};

}  // namespace

const ActivationKernels& ActivationKernels::cuda() {
  static const CudaActivationKernels kernels;
  return kernels;
}

}  // namespace anabranch
