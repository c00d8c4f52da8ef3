#pragma once

#include <anabranch/grouped_gemm.h>
#include <cuda_runtime_api.h>

#include "gemm/tiles/problem.h"
#include "gemm/tiles/task.h"

namespace anabranch {

/// An engine with a kernel of our own: all experts in one launch, whose counts are read on the GPU, of bf16 and fp16,
/// with what comes before or after in its epilogue. Sizes are multiples of 8, below 2^30.
class TileEngine : public GroupedGemmEngine {
 public:
  bool supports(torch::Dtype dtype, int64_t n, int64_t k) const final;
  bool gathers(GatheredRows /*rows*/, torch::Dtype dtype, int64_t n, int64_t k) const override {
    return supports(dtype, n, k);
  }

 protected:
  /// Rows of an expert are lines of a and c, of wgrad of a and b; b, of wgrad c, is [experts, ...].
  struct Operands {
    const ProductRows& a;
    const ProductRows& b;
    torch::Tensor c = {};  ///< of Epilogue::kStore
  };
  /// The products of `problem`, whose experts have `rows` rows together, at least one, on the current device in
  /// the order of `stream`. Problem::band is the kernel's to choose.
  virtual void launch(const tiles::Task& task, const Operands& operands,
                      const tiles::Problem& problem, int64_t rows, cudaStream_t stream) = 0;

 private:
  void do_forward(const torch::Tensor& x, const torch::Tensor& weight, const ExpertCounts& counts,
                  torch::Tensor& y) final;
  void do_dgrad(const torch::Tensor& dy, const torch::Tensor& weight, const ExpertCounts& counts,
                torch::Tensor& dx) final;
  void do_wgrad(const torch::Tensor& dy, const torch::Tensor& x, const ExpertCounts& counts,
                torch::Tensor& dweight) final;
  void do_wgrad_accumulate(const torch::Tensor& dy, const torch::Tensor& x,
                           const ExpertCounts& counts, torch::Tensor& sum) final;
  torch::Tensor do_forward_activated(const torch::Tensor& x, const torch::Tensor& weight,
                                     const ExpertCounts& counts, const HiddenActivation& activation,
                                     torch::Tensor& hidden) final;
  void do_dgrad_activated(const torch::Tensor& dy, const torch::Tensor& weight,
                          const ExpertCounts& counts, const HiddenActivation& activation,
                          const torch::Tensor& hidden, const torch::Tensor& routing_weights,
                          ActivatedGradient& gradient) final;
  void do_forward_gathering(const ProductRows& x, const torch::Tensor& weight,
                            const ExpertCounts& counts, torch::Tensor& y) final;
  void do_wgrad_gathering(const ProductRows& dy, const ProductRows& x, const ExpertCounts& counts,
                          torch::Tensor& dweight) final;
  void do_wgrad_accumulate_gathering(const ProductRows& dy, const ProductRows& x,
                                     const ExpertCounts& counts, torch::Tensor& sum) final;
  torch::Tensor do_forward_activated_gathering(const ProductRows& x, const torch::Tensor& weight,
                                               const ExpertCounts& counts,
                                               const HiddenActivation& activation,
                                               torch::Tensor& hidden) final;
  void do_dgrad_activated_gathering(const ProductRows& dy, const torch::Tensor& weight,
                                    const ExpertCounts& counts, const HiddenActivation& activation,
                                    const torch::Tensor& hidden,
                                    const torch::Tensor& routing_weights,
                                    ActivatedGradient& gradient) final;

  void multiply(tiles::Task task, const Operands& operands, tiles::Problem problem,
                const ExpertCounts& counts);
};

namespace tiles {
/// Of a tensor whose rows are read in pieces of 16 bytes; InputError where they do not begin so.
const void* aligned_data(const torch::Tensor& tensor);
}  // namespace tiles

/// Compute capability of a GPU, 10 · major + minor: 90 of an H100; 0 where there is none.
int compute_capability(torch::Device device);

}  // namespace anabranch
