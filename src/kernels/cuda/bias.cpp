#include <ATen/ops/zeros.h>

#include <algorithm>
#include <numeric>

#include "kernels/bias.h"
#include "kernels/cuda/bias.h"
#include "kernels/cuda/tensors.h"

namespace anabranch {
namespace {

/// {a, b, c} → {0, a, a+b, a+b+c}
std::vector<int64_t> offsets_of(const std::vector<int64_t>& counts) {
  std::vector<int64_t> offsets(counts.size() + 1, 0);
  std::partial_sum(counts.begin(), counts.end(), offsets.begin() + 1);
  return offsets;
}

class CudaBiasKernels final : public BiasKernels {
 public:
  void add_bias(torch::Tensor& rows, const torch::Tensor& bias,
                const std::vector<int64_t>& counts) const override {
    const OnDevice stream(rows);
    const torch::Tensor offsets = upload(offsets_of(counts), rows.device());
    cuda::launch_add_bias(cuda::scalar_of(rows), rows.data_ptr(), bias.const_data_ptr(),
                          offsets.const_data_ptr<int64_t>(), bias.size(0), rows.size(0),
                          rows.size(1), stream);
  }

  torch::Tensor bias_gradient(const torch::Tensor& rows, const torch::Tensor& weights,
                              const std::vector<int64_t>& counts) const override {
    const OnDevice stream(rows);
    const auto experts = static_cast<int64_t>(counts.size());
    std::vector<int64_t> chunk_counts;
    for (const int64_t count : counts) {
      chunk_counts.push_back((count + cuda::kBiasChunk - 1) / cuda::kBiasChunk);
    }
    std::vector<int64_t> table = offsets_of(counts);
    const std::vector<int64_t> chunks = offsets_of(chunk_counts);
    table.insert(table.end(), chunks.begin(), chunks.end());
    const auto scalar = cuda::scalar_of(rows);
    const int64_t counters =
        experts * cuda::bias_strips(scalar, rows.const_data_ptr(), rows.size(1));
    table.resize(table.size() + (counters + 1) / 2, 0);  // two in one of these
    const torch::Tensor device_table = upload(table, rows.device());
    auto* offsets = device_table.data_ptr<int64_t>();
    const torch::Tensor partial =
        at::empty({chunks.back(), rows.size(1)}, cuda::accumulate_options(rows));
    const bool all = std::find(counts.begin(), counts.end(), 0) == counts.end();
    torch::Tensor out = all ? at::empty({experts, rows.size(1)}, rows.options())
                            : at::zeros({experts, rows.size(1)}, rows.options());
    cuda::launch_bias_gradient(scalar, rows.const_data_ptr(), cuda::address_or_null(weights),
                               offsets, offsets + experts + 1, chunks.back(), experts, rows.size(1),
                               reinterpret_cast<unsigned*>(offsets + 2 * (experts + 1)),
                               partial.data_ptr(), out.data_ptr(), stream);
    return out;
  }

  torch::Tensor bias_dot(const torch::Tensor& rows, const torch::Tensor& bias,
                         const std::vector<int64_t>& counts) const override {
    const OnDevice stream(rows);
    const torch::Tensor offsets = upload(offsets_of(counts), rows.device());
    torch::Tensor out = at::empty({rows.size(0)}, cuda::accumulate_options(rows));
    cuda::launch_bias_dot(cuda::scalar_of(rows), rows.const_data_ptr(), bias.const_data_ptr(),
                          offsets.const_data_ptr<int64_t>(), bias.size(0), rows.size(0),
                          rows.size(1), out.data_ptr(), stream);
    return out;
  }
};

}  // namespace

const BiasKernels& BiasKernels::cuda() {
  static const CudaBiasKernels kernels;
  return kernels;
}

}  // namespace anabranch
