#pragma once

#include <anabranch/communicator.h>

namespace anabranch::test {

/// Every rank's rows (CPU tensors, dimension 0 may differ) one after another.
torch::Tensor gather_rows(Communicator& communicator, const torch::Tensor& rows);

/// Σ over ranks.
torch::Tensor sum_over_ranks(Communicator& communicator, const torch::Tensor& tensor);
double sum_over_ranks(Communicator& communicator, double value);

}  // namespace anabranch::test
