#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>

#include "kernels/bias.h"

namespace anabranch {
namespace {

/// Calls `body(expert, first_row, rows)` for every expert, in parallel.
template <typename Body>
void for_each_expert(const std::vector<int64_t>& counts, const Body& body) {
  std::vector<int64_t> first(counts.size() + 1, 0);
  for (size_t e = 0; e < counts.size(); ++e) {
    first[e + 1] = first[e] + counts[e];
  }
  at::parallel_for(0, static_cast<int64_t>(counts.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t e = begin; e < end; ++e) {
      body(e, first[e], counts[e]);
    }
  });
}

class CpuBiasKernels final : public BiasKernels {
 public:
  void add_bias(torch::Tensor& rows, const torch::Tensor& bias,
                const ExpertCounts& counts) const override {
    const int64_t width = rows.size(1);
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, rows.scalar_type(), "add_bias", [&] {
      auto* row = rows.data_ptr<scalar_t>();
      const auto* addend = bias.const_data_ptr<scalar_t>();
      for_each_expert(counts.on_host(), [&](int64_t expert, int64_t first, int64_t count) {
        for (int64_t p = first; p < first + count; ++p) {
          for (int64_t i = 0; i < width; ++i) {
            row[p * width + i] += addend[expert * width + i];
          }
        }
      });
    });
  }

  torch::Tensor bias_gradient(const torch::Tensor& rows, const torch::Tensor& weights,
                              const ExpertCounts& counts) const override {
    const int64_t width = rows.size(1);
    torch::Tensor out = at::empty({counts.experts(), width}, rows.options());
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, rows.scalar_type(), "bias_grad", [&] {
      using acc_t = at::opmath_type<scalar_t>;
      const auto* row = rows.const_data_ptr<scalar_t>();
      const auto* weight = weights.defined() ? weights.const_data_ptr<acc_t>() : nullptr;
      auto* target = out.data_ptr<scalar_t>();
      for_each_expert(counts.on_host(), [&](int64_t expert, int64_t first, int64_t count) {
        std::vector<acc_t> sum(width, 0);
        for (int64_t p = first; p < first + count; ++p) {
          const acc_t scale = weight != nullptr ? weight[p] : acc_t{1};
          for (int64_t i = 0; i < width; ++i) {
            sum[i] += scale * static_cast<acc_t>(row[p * width + i]);
          }
        }
        std::copy_n(sum.data(), width, target + expert * width);
      });
    });
    return out;
  }

  torch::Tensor bias_dot(const torch::Tensor& rows, const torch::Tensor& bias,
                         const ExpertCounts& counts) const override {
    const int64_t width = rows.size(1);
    torch::Tensor out =
        at::empty({rows.size(0)}, rows.options().dtype(at::toOpMathType(rows.scalar_type())));
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, rows.scalar_type(), "bias_dot", [&] {
      using acc_t = at::opmath_type<scalar_t>;
      const auto* row = rows.const_data_ptr<scalar_t>();
      const auto* factor = bias.const_data_ptr<scalar_t>();
      auto* target = out.data_ptr<acc_t>();
      for_each_expert(counts.on_host(), [&](int64_t expert, int64_t first, int64_t count) {
        for (int64_t p = first; p < first + count; ++p) {
          acc_t sum = 0;
          for (int64_t i = 0; i < width; ++i) {
            sum += static_cast<acc_t>(row[p * width + i]) *
                   static_cast<acc_t>(factor[expert * width + i]);
          }
          target[p] = sum;
        }
      });
    });
    return out;
  }
};

}  // namespace

const BiasKernels& BiasKernels::cpu() {
  static const CpuBiasKernels kernels;
  return kernels;
}

}  // namespace anabranch
