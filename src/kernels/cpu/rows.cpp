#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>

#include <cstring>
#include <limits>

#include "kernels/cpu/rows_per_task.h"
#include "kernels/rows.h"

namespace anabranch {
namespace {

/// Sum of one group's rows into `out` [width], kept in `sum` [width] until it is complete.
template <typename scalar_t, typename acc_t>
void sum_group(const scalar_t* rows, int64_t width, const int64_t* member, const int64_t* end,
               const acc_t* weights, acc_t* sum, scalar_t* out) {
  std::fill_n(sum, width, acc_t{0});
  for (; member != end; ++member) {
    const scalar_t* row = rows + *member * width;
    const acc_t weight = weights != nullptr ? weights[*member] : acc_t{1};
    for (int64_t i = 0; i < width; ++i) {
      sum[i] += weight * static_cast<acc_t>(row[i]);
    }
  }
  std::copy_n(sum, width, out);
}

class CpuRowKernels final : public RowKernels {
 public:
  void gather_rows_into(torch::Tensor out, const torch::Tensor& rows,
                        const torch::Tensor& index) const override {
    const int64_t width = rows.dim() == 1 ? 1 : rows.size(1);
    const int64_t bytes = width * rows.element_size();
    const auto* source = static_cast<const char*>(rows.const_data_ptr());
    auto* target = static_cast<char*>(out.data_ptr());
    const int64_t* from = index.const_data_ptr<int64_t>();
    at::parallel_for(0, index.size(0), rows_per_task(width), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        std::memcpy(target + i * bytes, source + from[i] * bytes, bytes);
      }
    });
  }

  torch::Tensor scatter_rows(const torch::Tensor& rows, const Csr& groups) const override {
    torch::Tensor out = at::empty({groups.members.size(0), rows.size(1)}, rows.options());
    const int64_t bytes = rows.size(1) * static_cast<int64_t>(rows.element_size());
    const auto* source = static_cast<const char*>(rows.const_data_ptr());
    auto* target = static_cast<char*>(out.data_ptr());
    const int64_t* offsets = groups.offsets.const_data_ptr<int64_t>();
    const int64_t* members = groups.members.const_data_ptr<int64_t>();
    at::parallel_for(0, rows.size(0), rows_per_task(rows.size(1)), [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) {
        for (int64_t i = offsets[g]; i < offsets[g + 1]; ++i) {
          std::memcpy(target + members[i] * bytes, source + g * bytes, bytes);
        }
      }
    });
    return out;
  }

  torch::Tensor sum_rows(const torch::Tensor& rows, const Csr& groups,
                         const torch::Tensor& weights) const override {
    const int64_t width = rows.size(1);
    torch::Tensor out = at::empty({groups.offsets.size(0) - 1, width}, rows.options());
    const int64_t* offsets = groups.offsets.const_data_ptr<int64_t>();
    const int64_t* members = groups.members.const_data_ptr<int64_t>();
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, rows.scalar_type(), "sum_rows", [&] {
      using acc_t = at::opmath_type<scalar_t>;
      const auto* row = rows.const_data_ptr<scalar_t>();
      const auto* weight = weights.defined() ? weights.const_data_ptr<acc_t>() : nullptr;
      auto* target = out.data_ptr<scalar_t>();
      at::parallel_for(0, out.size(0), rows_per_task(width), [&](int64_t begin, int64_t end) {
        std::vector<acc_t> sum(width);
        for (int64_t g = begin; g < end; ++g) {
          sum_group(row, width, members + offsets[g], members + offsets[g + 1], weight, sum.data(),
                    target + g * width);
        }
      });
    });
    return out;
  }

  void spoil(const std::vector<torch::Tensor>& tensors,
             const torch::Tensor& spoilt) const override {
    for (const auto& tensor : tensors) {
      if (*spoilt.const_data_ptr<int64_t>() != 0) {
        tensor.fill_(std::numeric_limits<double>::quiet_NaN());
      }
    }
  }
};

}  // namespace

const RowKernels& RowKernels::cpu() {
  static const CpuRowKernels kernels;
  return kernels;
}

}  // namespace anabranch
