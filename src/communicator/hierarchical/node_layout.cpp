#include "communicator/hierarchical/node_layout.h"

#include <algorithm>
#include <iterator>
#include <map>
#include <numeric>

namespace anabranch {
namespace {

/// Of fewer bytes it is the number of messages that counts, not what crosses between nodes.
constexpr size_t kLargeSum = 1 << 20;

}  // namespace

NodeLayout::NodeLayout(const std::vector<std::string>& names) {
  std::map<std::string, int> numbers;
  for (const auto& name : names) {
    const int rank = static_cast<int>(node_of_.size());
    const int node = numbers.emplace(name, nodes()).first->second;
    if (node == nodes()) {
      members_.emplace_back();
    }
    node_of_.push_back(node);
    place_.push_back(static_cast<int>(members_[node].size()));
    members_[node].push_back(rank);
  }
}

bool NodeLayout::has_two_levels() const {
  return members_.size() > 1 && members_.size() < node_of_.size();
}

std::vector<std::vector<int>> NodeLayout::levels_of_sum(int rank, size_t bytes) const {
  std::vector<int> all(node_of_.size());
  std::iota(all.begin(), all.end(), 0);
  const bool equal = std::all_of(members_.begin(), members_.end(), [&](const auto& node) {
    return node.size() == members_.front().size();
  });
  if (!has_two_levels() || !equal || bytes < kLargeSum) {
    return {all};
  }
  std::vector<int> counterparts;
  std::copy_if(all.begin(), all.end(), std::back_inserter(counterparts),
               [&](int other) { return place_[other] == place_[rank]; });
  return {members_[node_of_[rank]], counterparts};
}

int NodeLayout::forwarder(int node, int destination) const {
  if (node_of_[destination] == node) {
    return destination;
  }
  const auto& candidates = members_[node];
  return candidates[static_cast<size_t>(place_[destination]) % candidates.size()];
}

std::vector<int> NodeLayout::forwarded_by(int rank) const {
  std::vector<int> destinations;
  for (int destination = 0; destination < static_cast<int>(node_of_.size()); ++destination) {
    if (forwarder(node_of_[rank], destination) == rank) {
      destinations.push_back(destination);
    }
  }
  return destinations;
}

}  // namespace anabranch
