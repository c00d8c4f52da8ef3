#include "support/collectives.h"

#include <vector>

namespace anabranch::test {

torch::Tensor gather_rows(Communicator& communicator, const torch::Tensor& rows) {
  const auto counts = communicator.all_gather(torch::tensor({rows.size(0)}, torch::kInt64));
  auto sizes = rows.sizes().vec();
  sizes[0] = counts.max().item<int64_t>();
  auto padded = torch::zeros(sizes, rows.options().requires_grad(false));
  padded.slice(0, 0, rows.size(0)).copy_(rows.detach());
  const auto gathered = communicator.all_gather(padded);
  std::vector<torch::Tensor> parts;
  for (int rank = 0; rank < communicator.size(); ++rank) {
    parts.push_back(gathered[rank].slice(0, 0, counts[rank].item<int64_t>()));
  }
  return torch::cat(parts);
}

torch::Tensor sum_over_ranks(Communicator& communicator, const torch::Tensor& tensor) {
  auto sum = tensor.detach().clone(torch::MemoryFormat::Contiguous);
  communicator.all_reduce(sum);
  return sum;
}

double sum_over_ranks(Communicator& communicator, double value) {
  return sum_over_ranks(communicator, torch::tensor({value}, torch::kFloat64)).item<double>();
}

}  // namespace anabranch::test
