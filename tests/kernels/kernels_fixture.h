#pragma once

#include <gtest/gtest.h>

#include <limits>
#include <numeric>
#include <vector>

#include "kernels/activation.h"
#include "kernels/bias.h"
#include "kernels/gate.h"
#include "kernels/plan.h"
#include "kernels/routing.h"
#include "kernels/rows.h"
#include "support/devices.h"
#include "support/random.h"
#include "support/tolerance.h"
#include "support/world.h"

namespace anabranch::test {

/// Kernels of one device against naive loops on the CPU.
class KernelsTest : public ::testing::TestWithParam<torch::Device> {
 protected:
  torch::Tensor on_device(const torch::Tensor& tensor) const { return tensor.to(GetParam()); }

  /// Rows of each expert, some without any.
  std::vector<int64_t> random_counts(int64_t experts, int64_t largest) {
    std::vector<int64_t> counts;
    for (int64_t e = 0; e < experts; ++e) {
      counts.push_back(random_.chance(0.3) ? 0 : random_.integer(1, largest));
    }
    return counts;
  }
  static int64_t sum(const std::vector<int64_t>& counts) {
    return std::accumulate(counts.begin(), counts.end(), int64_t{0});
  }
  /// [Σ counts] expert of each row.
  static torch::Tensor expert_of_rows(const std::vector<int64_t>& counts) {
    return torch::arange(static_cast<int64_t>(counts.size()))
        .repeat_interleave(torch::tensor(counts, torch::kInt64));
  }

  const ActivationKernels& activation_ = ActivationKernels::on(GetParam());
  const BiasKernels& bias_ = BiasKernels::on(GetParam());
  const GateKernels& gate_ = GateKernels::on(GetParam());
  const PlanKernels& plan_ = PlanKernels::on(GetParam());
  const RoutingKernels& routing_ = RoutingKernels::on(GetParam());
  const RowKernels& rows_ = RowKernels::on(GetParam());
  Random random_{test_seed()};
};

struct ActivationBackward {
  torch::Tensor weighted;
  torch::Tensor dhidden;
  torch::Tensor dweights;
};
/// Backward of the activation into poisoned outputs; `dactivated` stays as it is.
inline ActivationBackward activate_backward(const ActivationKernels& kernels,
                                            const torch::Tensor& dactivated,
                                            const torch::Tensor& hidden,
                                            const torch::Tensor& weights, Activation activation,
                                            bool glu) {
  const auto nan = std::numeric_limits<double>::quiet_NaN();
  ActivationBackward result{
      dactivated.clone(), torch::full_like(hidden, nan),
      torch::full({hidden.size(0)}, nan,
                  hidden.options().dtype(accumulation_type(hidden.scalar_type())))};
  kernels.activate_backward(result.weighted, hidden, weights, {activation, glu},
                            {result.dhidden, result.dweights});
  return result;
}

inline std::vector<int64_t> numbers(const torch::Tensor& tensor) {
  const auto flat = tensor.cpu().to(torch::kInt64).contiguous();
  return {flat.const_data_ptr<int64_t>(), flat.const_data_ptr<int64_t>() + flat.numel()};
}

}  // namespace anabranch::test

#define ANABRANCH_FOR_EACH_DEVICE(fixture)                                   \
  INSTANTIATE_TEST_SUITE_P(Devices, fixture, ::testing::ValuesIn(devices()), \
                           [](const auto& info) { return device_name(info.param); })
