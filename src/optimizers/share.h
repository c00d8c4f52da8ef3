#pragma once

#include <anabranch/communicator.h>
#include <torch/types.h>

#include <vector>

namespace anabranch {

/// `by_rank[r]`, contiguous tensors of the same shapes on every rank, become rank r's. Collective.
void share(const std::vector<std::vector<torch::Tensor>>& by_rank, Communicator& communicator);

}  // namespace anabranch
