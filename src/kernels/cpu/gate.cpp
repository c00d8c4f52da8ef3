#include <ATen/ops/stack.h>
#include <ATen/ops/sum.h>

#include "kernels/gate.h"

namespace anabranch {
namespace {

class CpuGateKernels final : public GateKernels {
 public:
  torch::Tensor split(const torch::Tensor& x, const SplitPlaces& parts,
                      bool side_by_side) const override {
    std::vector<torch::Tensor> all;
    auto rest = x;
    for (int i = 0; i < 3; ++i) {
      all.push_back(rest.to(torch::kBFloat16));
      rest = rest - all.back();
    }
    std::vector<torch::Tensor> places;
    for (const int part : parts) {
      places.push_back(all.at(part));
    }
    return at::stack(places, side_by_side ? 1 : 0);
  }

  torch::Tensor sum_split(const torch::Tensor& pieces, const torch::Tensor& rest,
                          const std::array<int, 3>& order) const override {
    auto sums = pieces.sum(0);
    if (rest.defined()) sums.add_(rest);
    return sums[order[0]] + sums[order[1]] + sums[order[2]];
  }

  torch::Tensor sum_parts(const torch::Tensor& parts) const override {
    return parts.select(1, 0) + parts.select(1, 1) + parts.select(1, 2);
  }
};

}  // namespace

const GateKernels& GateKernels::cpu() {
  static const CpuGateKernels kernels;
  return kernels;
}

}  // namespace anabranch
