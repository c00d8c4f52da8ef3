#pragma once

#include <string>
#include <vector>

namespace anabranch {

/// Which ranks share a node, and through whom rows reach other nodes.
class NodeLayout {
 public:
  /// `names`: of each rank's node.
  explicit NodeLayout(const std::vector<std::string>& names);

  int nodes() const { return static_cast<int>(members_.size()); }
  int node_of(int rank) const { return node_of_[rank]; }
  /// Ranks of a node, ascending.
  const std::vector<int>& members(int node) const { return members_[node]; }
  /// Some node has several ranks, and there are several nodes.
  bool has_two_levels() const;

  /// The levels of sum_in_levels for `rank` and a tensor of so many bytes: the ranks of its node, then those
  /// that have its place on the others, where all nodes have as many and the tensor is large; else all.
  std::vector<std::vector<int>> levels_of_sum(int rank, size_t bytes) const;

  /// The rank of `node` that takes what its members send to `destination`: itself where it is one of
  /// them, else the one with the destination's place in its node (modulo the node's ranks).
  int forwarder(int node, int destination) const;
  /// The destinations that `rank` is the forwarder of, for its own node; ascending.
  std::vector<int> forwarded_by(int rank) const;

 private:
  std::vector<int> node_of_;  ///< numbered by their lowest rank
  std::vector<int> place_;    ///< of each rank among its node's
  std::vector<std::vector<int>> members_;
};

}  // namespace anabranch
