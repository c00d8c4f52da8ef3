#pragma once

#include <anabranch/communicator.h>

#include <functional>
#include <vector>

namespace anabranch {

/// Replaces `tensor` with its sum over ranks, in levels: in each, every one of its `members`, ranks in
/// ascending order with this one among them, sums one chunk of what it has from the level before, in their
/// order; then the sums go back level by level. 16-bit types are summed in fp32, and rounded at the end.
/// One level of all ranks sums in rank order. `exchange` sends and receives messages; every rank calls it
/// as often.
void sum_in_levels(torch::Tensor& tensor, int rank, const std::vector<std::vector<int>>& levels,
                   const std::function<void(const Messages&)>& exchange);

}  // namespace anabranch
