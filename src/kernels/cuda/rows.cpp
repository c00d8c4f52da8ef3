#include "kernels/rows.h"
#include "kernels/cuda/rows.h"
#include "kernels/cuda/tensors.h"

namespace anabranch {
namespace {

class CudaRowKernels final : public RowKernels {
 public:
  void gather_rows_into(torch::Tensor out, const torch::Tensor& rows,
                        const torch::Tensor& index) const override {
    const OnDevice stream(rows);
    const int64_t width = rows.dim() == 1 ? 1 : rows.size(1);
    cuda::launch_gather_rows(rows.const_data_ptr(), index.const_data_ptr<int64_t>(), index.size(0),
                             width * static_cast<int64_t>(rows.element_size()), out.data_ptr(),
                             stream);
  }

  torch::Tensor scatter_rows(const torch::Tensor& rows, const Csr& groups) const override {
    const OnDevice stream(rows);
    torch::Tensor out = at::empty({groups.members.size(0), rows.size(1)}, rows.options());
    cuda::launch_scatter_rows(rows.const_data_ptr(), groups.offsets.const_data_ptr<int64_t>(),
                              groups.members.const_data_ptr<int64_t>(), rows.size(0),
                              rows.size(1) * static_cast<int64_t>(rows.element_size()),
                              out.data_ptr(), stream);
    return out;
  }

  torch::Tensor sum_rows(const torch::Tensor& rows, const Csr& groups,
                         const torch::Tensor& weights) const override {
    const OnDevice stream(rows);
    torch::Tensor out = at::empty({groups.offsets.size(0) - 1, rows.size(1)}, rows.options());
    cuda::launch_sum_rows(cuda::scalar_of(rows), rows.const_data_ptr(),
                          groups.offsets.const_data_ptr<int64_t>(),
                          groups.members.const_data_ptr<int64_t>(), cuda::address_or_null(weights),
                          out.size(0), out.size(1), out.data_ptr(), stream);
    return out;
  }

  void spoil(const std::vector<torch::Tensor>& tensors,
             const torch::Tensor& spoilt) const override {
    const OnDevice stream(spoilt);
    cuda::Spoilt numbers = {};
    TORCH_INTERNAL_ASSERT(tensors.size() <= cuda::kMostSpoilt);
    for (const auto& tensor : tensors) {
      numbers.tensors[numbers.count] = tensor.data_ptr();
      numbers.bytes[numbers.count++] = static_cast<int64_t>(tensor.nbytes());
    }
    cuda::launch_spoil(numbers, spoilt.const_data_ptr<int64_t>(), stream);
  }
};

}  // namespace

const RowKernels& RowKernels::cuda() {
  static const CudaRowKernels kernels;
  return kernels;
}

}  // namespace anabranch
