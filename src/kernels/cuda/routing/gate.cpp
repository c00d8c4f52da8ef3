#include "kernels/gate.h"
#include "kernels/cuda/routing/gate.h"
#include "kernels/cuda/tensors.h"

namespace anabranch {
namespace {

class CudaGateKernels final : public GateKernels {
 public:
  torch::Tensor split(const torch::Tensor& x, const SplitPlaces& parts,
                      bool side_by_side) const override {
    const OnDevice stream(x);
    const int64_t m = x.size(0);
    const int64_t n = x.size(1);
    torch::Tensor out = at::empty({side_by_side ? m : 4, side_by_side ? 4 : m, n},
                                  x.options().dtype(torch::kBFloat16));
    cuda::launch_split(x.const_data_ptr<float>(), m, n, parts.data(), side_by_side, out.data_ptr(),
                       stream);
    return out;
  }

  torch::Tensor sum_split(const torch::Tensor& pieces, const torch::Tensor& rest,
                          const std::array<int, 3>& order) const override {
    const OnDevice stream(pieces);
    torch::Tensor out = at::empty({pieces.size(2), pieces.size(3)}, pieces.options());
    cuda::launch_sum_split(pieces.const_data_ptr<float>(), pieces.size(0),
                           rest.defined() ? rest.const_data_ptr<float>() : nullptr, out.numel(),
                           order.data(), out.data_ptr<float>(), stream);
    return out;
  }

  torch::Tensor sum_parts(const torch::Tensor& parts) const override {
    const OnDevice stream(parts);
    torch::Tensor out = at::empty({parts.size(0), parts.size(2)}, parts.options());
    cuda::launch_sum_parts(parts.const_data_ptr<float>(), parts.size(0), parts.size(2),
                           out.data_ptr<float>(), stream);
    return out;
  }
};

}  // namespace

const GateKernels& GateKernels::cuda() {
  static const CudaGateKernels kernels;
  return kernels;
}

}  // namespace anabranch
