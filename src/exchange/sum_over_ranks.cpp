#include "exchange/sum_over_ranks.h"

#include <torch/csrc/autograd/custom_function.h>

namespace anabranch {
namespace {

struct SumOverRanks : torch::autograd::Function<SumOverRanks> {
  static torch::Tensor forward(torch::autograd::AutogradContext* context,
                               const torch::Tensor& tensor, Communicator* communicator) {
    context->saved_data["ranks"] = static_cast<int64_t>(communicator->size());
    auto sum = tensor.contiguous().clone();
    communicator->all_reduce(sum);
    return sum;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& gradients) {
    return {gradients[0] * context->saved_data["ranks"].toInt(), {}};
  }
};

}  // namespace

torch::Tensor sum_over_ranks(const torch::Tensor& tensor, Communicator& communicator) {
  return SumOverRanks::apply(tensor, &communicator);
}

}  // namespace anabranch
