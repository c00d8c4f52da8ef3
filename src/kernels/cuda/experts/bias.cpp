#include "kernels/bias.h"
#include "kernels/cuda/experts/bias.h"
#include "kernels/cuda/tensors.h"

namespace anabranch {
namespace {

class CudaBiasKernels final : public BiasKernels {
 public:
  void add_bias(torch::Tensor& rows, const torch::Tensor& bias,
                const ExpertCounts& counts) const override {
    const OnDevice stream(rows);
    const auto& offsets = counts.on(rows.device()).first_row;
    cuda::launch_add_bias(cuda::scalar_of(rows), rows.data_ptr(), bias.const_data_ptr(),
                          offsets.const_data_ptr<int64_t>(), bias.size(0), rows.size(0),
                          rows.size(1), stream);
  }

  torch::Tensor bias_gradient(const torch::Tensor& rows, const torch::Tensor& weights,
                              const ExpertCounts& counts) const override {
    const OnDevice stream(rows);
    const int64_t experts = counts.experts();
    const auto scalar = cuda::scalar_of(rows);
    torch::Tensor out = at::empty({experts, rows.size(1)}, rows.options());
    const int64_t counters =
        experts * cuda::bias_strips(scalar, rows.const_data_ptr(), rows.size(1));
    // Two counters in one of these.
    const torch::Tensor table =
        at::empty({experts + 1 + (counters + 1) / 2}, rows.options().dtype(torch::kInt64));
    const torch::Tensor partial =
        at::empty({cuda::most_bias_chunks(rows.size(0), experts), rows.size(1)},
                  cuda::accumulate_options(rows));
    auto* const chunks = table.data_ptr<int64_t>();
    cuda::launch_bias_gradient(
        scalar, rows.const_data_ptr(), cuda::address_or_null(weights),
        counts.on(rows.device()).first_row.const_data_ptr<int64_t>(), rows.size(0), experts,
        rows.size(1),
        {chunks, reinterpret_cast<unsigned*>(chunks + experts + 1), partial.data_ptr()},
        out.data_ptr(), stream);
    return out;
  }

  torch::Tensor bias_dot(const torch::Tensor& rows, const torch::Tensor& bias,
                         const ExpertCounts& counts) const override {
    const OnDevice stream(rows);
    const auto& offsets = counts.on(rows.device()).first_row;
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
