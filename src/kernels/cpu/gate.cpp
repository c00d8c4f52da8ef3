#include <ATen/ops/stack.h>

#include "kernels/gate.h"

namespace anabranch {
namespace {

class CpuGateKernels final : public GateKernels {
 public:
  torch::Tensor split(const torch::Tensor& x, const std::array<int, 3>& parts,
                      bool side_by_side) const override {
    std::vector<torch::Tensor> all;
    auto rest = x;
    for (size_t i = 0; i < parts.size(); ++i) {
      all.push_back(rest.to(torch::kBFloat16));
      rest = rest - all.back();
    }
    std::vector<torch::Tensor> places;
    for (const int part : parts) {
      places.push_back(all.at(part));
    }
    return at::stack(places, side_by_side ? 1 : 0);
  }
};

}  // namespace

const GateKernels& GateKernels::cpu() {
  static const CpuGateKernels kernels;
  return kernels;
}

}  // namespace anabranch
