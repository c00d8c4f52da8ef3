#pragma once

#include <anabranch/communicator.h>

#include <functional>
#include <memory>
#include <vector>

#include "communicator/hierarchical/node_layout.h"

namespace anabranch {

/// An all-to-all in two hops over a flat communicator: to the forwarder on this node, and from there
/// to the destination. Made once for a group of ranks.
class TwoHops {
 public:
  TwoHops(std::shared_ptr<Communicator> flat, NodeLayout layout);

  const NodeLayout& layout() const { return layout_; }
  /// How the flat communicator starts an all-to-all on the current stream.
  using StartFlat = std::function<std::unique_ptr<Pending>(std::vector<Transfer>)>;
  /// As `Communicator::all_to_all_v`: rows are within the node when this returns, and what is left is the
  /// way between nodes. Collective.
  std::unique_ptr<Pending> start(const std::vector<Transfer>& transfers,
                                 const StartFlat& start_flat) const;

 private:
  using Rows = std::vector<int64_t>;
  /// Rows of one transfer that this rank forwards: [members of the node][forwarded destinations].
  using Forwarded = std::vector<Rows>;

  class SecondHop;
  std::vector<Forwarded> exchange_counts(const std::vector<Transfer>& transfers) const;
  Transfer first_hop(const Transfer& transfer, const Forwarded& forwarded) const;
  Transfer second_hop(const Transfer& transfer, const torch::Tensor& arrived,
                      const Forwarded& forwarded) const;
  void put_in_order(const Transfer& transfer, const torch::Tensor& from_node,
                    const Forwarded& forwarded, const Transfer& from_others) const;
  const std::vector<int>& node() const { return layout_.members(layout_.node_of(flat_->rank())); }

  std::shared_ptr<Communicator> flat_;
  NodeLayout layout_;
  std::vector<std::vector<int>> destinations_;  ///< [members of the node] forwarded by each
  std::vector<int> mine_;                       ///< forwarded by this rank
};

}  // namespace anabranch
