#pragma once

#include <gtest/gtest.h>

#include <numeric>
#include <vector>

#include "kernels/kernels.h"
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

  const Kernels& kernels_ = kernels_for(GetParam());
  Random random_{test_seed()};
};

inline std::vector<int64_t> numbers(const torch::Tensor& tensor) {
  const auto flat = tensor.cpu().to(torch::kInt64).contiguous();
  return {flat.const_data_ptr<int64_t>(), flat.const_data_ptr<int64_t>() + flat.numel()};
}

}  // namespace anabranch::test

#define ANABRANCH_FOR_EACH_DEVICE(fixture)                                               \
  INSTANTIATE_TEST_SUITE_P(Devices, fixture, ::testing::ValuesIn(devices()),             \
                           [](const auto& info) { return device_name(info.param); })
