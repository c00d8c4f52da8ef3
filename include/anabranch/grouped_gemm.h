#pragma once

#include <torch/types.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace anabranch {

/// One way to multiply each expert's own rows by its own weight.
///
/// Rows lie expert-major: expert e owns the `counts[e]` rows after those of experts 0..e−1. Counts
/// are exact and may be zero. Tensors are contiguous, of one type and device; outputs are
/// preallocated and every element is written. Accumulation in fp32 (fp64 for fp64).
class GroupedGemmEngine {
 public:
  virtual ~GroupedGemmEngine() = default;
  virtual std::string name() const = 0;

  /// y[P, n] = x[P, k] · weight[e]ᵀ, weight [experts, n, k].
  virtual void forward(const torch::Tensor& x, const torch::Tensor& weight,
                       const std::vector<int64_t>& counts, torch::Tensor& y) = 0;
  /// dx[P, k] = dy[P, n] · weight[e].
  virtual void dgrad(const torch::Tensor& dy, const torch::Tensor& weight,
                     const std::vector<int64_t>& counts, torch::Tensor& dx) = 0;
  /// dweight[e] = dy_eᵀ · x_e, [experts, n, k]; zero for an expert without rows.
  virtual void wgrad(const torch::Tensor& dy, const torch::Tensor& x,
                     const std::vector<int64_t>& counts, torch::Tensor& dweight) = 0;
};

/// The engine of that name for that device: "auto" or one of `grouped_gemm_engines`.
std::shared_ptr<GroupedGemmEngine> make_grouped_gemm_engine(torch::Device device,
                                                            const std::string& name = "auto");
/// Names of the engines built for a device.
std::vector<std::string> grouped_gemm_engines(torch::Device device);

/// x [P, k], weight [experts, n, k], Σ counts = P → [P, n]. Checks shapes; no autograd.
torch::Tensor grouped_gemm(GroupedGemmEngine& engine, const torch::Tensor& x,
                           const torch::Tensor& weight, const std::vector<int64_t>& counts);
/// The same into `y` [P, n].
void grouped_gemm_out(GroupedGemmEngine& engine, const torch::Tensor& x,
                      const torch::Tensor& weight, const std::vector<int64_t>& counts,
                      torch::Tensor& y);
/// dy [P, n], weight [experts, n, k] → [P, k].
torch::Tensor grouped_gemm_dgrad(GroupedGemmEngine& engine, const torch::Tensor& dy,
                                 const torch::Tensor& weight, const std::vector<int64_t>& counts);
/// The same into `dx` [P, k].
void grouped_gemm_dgrad_out(GroupedGemmEngine& engine, const torch::Tensor& dy,
                            const torch::Tensor& weight, const std::vector<int64_t>& counts,
                            torch::Tensor& dx);
/// dy [P, n], x [P, k] → [experts, n, k].
torch::Tensor grouped_gemm_wgrad(GroupedGemmEngine& engine, const torch::Tensor& dy,
                                 const torch::Tensor& x, const std::vector<int64_t>& counts);
/// The same into `dweight` [experts, n, k].
void grouped_gemm_wgrad_out(GroupedGemmEngine& engine, const torch::Tensor& dy,
                            const torch::Tensor& x, const std::vector<int64_t>& counts,
                            torch::Tensor& dweight);

}  // namespace anabranch
