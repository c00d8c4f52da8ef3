#include <stdexcept>

#include "fused_kernels/kernels.h"

// Built in the place of cuda.cpp where there is no CUDA: then there are no tensors for it either.
namespace train_lm {
namespace {

[[noreturn]] void refuse() { throw std::logic_error("built without CUDA"); }

}  // namespace

Heads heads_of(const torch::Tensor&, const torch::Tensor&, const torch::Tensor&,
               const torch::Tensor&, const HeadsOptions&) {
  refuse();
}
HeadsGradient heads_backward(const torch::Tensor&, const torch::Tensor&, const torch::Tensor&,
                             const torch::Tensor&, const torch::Tensor&, const torch::Tensor&,
                             const torch::Tensor&, const HeadsOptions&) {
  refuse();
}
torch::Tensor cross_entropy_of_rows(torch::Tensor&, const torch::Tensor&, double, bool) {
  refuse();
}

}  // namespace train_lm
