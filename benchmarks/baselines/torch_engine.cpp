#include "baselines/torch_engine.h"

#include <ATen/ops/_grouped_mm.h>
#include <ATen/ops/empty.h>

#include <limits>
#include <numeric>

#include "support/check.h"

namespace anabranch {
namespace {

class TorchEngine final : public GroupedGemmEngine {
 public:
  explicit TorchEngine(torch::Device device) : device_(device) {}

  std::string name() const override { return "torch_grouped_mm"; }

  /// Rows must be multiples of 16 bytes.
  bool supports(torch::Dtype dtype, int64_t n, int64_t k) const override {
    const bool known = dtype == torch::kBFloat16 ||
                       (device_.is_cpu() && (dtype == torch::kHalf || dtype == torch::kFloat32));
    const auto aligned = [&](int64_t width) {
      return width > 0 && width * static_cast<int64_t>(c10::elementSize(dtype)) % 16 == 0;
    };
    return known && aligned(n) && aligned(k);
  }

 private:
  void do_forward(const torch::Tensor& x, const torch::Tensor& weight, const ExpertCounts& counts,
                  torch::Tensor& y) override {
    multiply(x, weight.transpose(1, 2), counts, y);
  }
  void do_dgrad(const torch::Tensor& dy, const torch::Tensor& weight, const ExpertCounts& counts,
                torch::Tensor& dx) override {
    multiply(dy, weight, counts, dx);
  }
  void do_wgrad(const torch::Tensor& dy, const torch::Tensor& x, const ExpertCounts& counts,
                torch::Tensor& dweight) override {
    if (dy.size(0) == 0) {
      dweight.zero_();
      return;
    }
    multiply(dy.t(), x, counts, dweight);
    for (size_t e = 0; e < counts.on_host().size();
         ++e) {  // sums of nothing, of which it says nothing
      if (counts.on_host()[e] == 0) dweight.select(0, static_cast<int64_t>(e)).zero_();
    }
  }

  static void multiply(const torch::Tensor& a, const torch::Tensor& b, const ExpertCounts& counts,
                       torch::Tensor& c) {
    if (c.numel() > 0) {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      c.copy_(at::_grouped_mm(a, b, row_ends(counts.on_host(), a.device())));
    }
  }

  torch::Device device_;
};

}  // namespace

torch::Tensor row_ends(const std::vector<int64_t>& counts, torch::Device device) {
  const int64_t rows = std::accumulate(counts.begin(), counts.end(), int64_t{0});
  check_input(rows <= std::numeric_limits<int32_t>::max(),
              "grouped GEMM: torch_grouped_mm takes fewer than 2^31 rows, got ", rows);
  const auto experts = static_cast<int64_t>(counts.size());
  torch::Tensor host =
      at::empty({experts}, at::TensorOptions(torch::kInt32).pinned_memory(device.is_cuda()));
  std::partial_sum(counts.begin(), counts.end(), host.data_ptr<int32_t>());
  // In the order of the GPU's current stream, without waiting for it.
  return host.to(device, /*non_blocking=*/true);
}

std::shared_ptr<GroupedGemmEngine> make_torch_engine(torch::Device device) {
  return std::make_shared<TorchEngine>(device);
}

}  // namespace anabranch
