#pragma once

#include <anabranch/communicator.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace anabranch {

/// The way of the rows of an all-to-all.
enum class AllToAll {
  kFlat,          ///< from each rank straight to each other rank
  kHierarchical,  ///< within the node first, then between nodes, a node's rows in one message
  kAuto,          ///< the faster of both, as measured on the first calls of each kind
};

/// The way of the rows, and what it is chosen by.
struct HierarchicalOptions {
  AllToAll all_to_all = AllToAll::kAuto;  ///< the same on all ranks
  /// Ranks with the same name are on one node; empty: the host's name.
  std::string node;
  /// kAuto: timed calls of each way, the first of which is for warming up; at least 2.
  int64_t trials = 4;
};

/// The ranks of `flat`, with rows that take the way of `options`: the same bit for bit.
///
/// Hierarchical (the two-dimensional all-to-all of Tutel, arXiv:2206.03382, section 4.3, for any
/// counts): with L ranks on each of N nodes a rank sends L − 1 messages within its node and N − 1 to
/// other nodes, instead of N·L − 1. It pays for them with a second copy of the rows and one small
/// message more: good for many short messages over a slow network, bad for few long ones.
/// Sums of 1 MiB and more go within the nodes first, too, but for kFlat, where all nodes have as many
/// ranks: then 1/L of what is else crosses between nodes, and the terms are added within each node first.
/// On a GPU the host waits for the calls that kAuto measures.
/// Nodes may have different numbers of ranks, and ranks may lie on them in any order. Collective:
/// all ranks give the same options, but for the node.
std::shared_ptr<Communicator> make_hierarchical_communicator(
    std::shared_ptr<Communicator> flat, const HierarchicalOptions& options = {});

/// What kAuto has measured and chosen for one kind of call: the bytes of a row of each transfer.
struct AllToAllChoice {
  std::vector<int64_t> row_bytes;
  double flat_seconds = 0;  ///< medians over trials of the fastest rank's time: without waiting
  double hierarchical_seconds = 0;
  AllToAll chosen = AllToAll::kFlat;
};

/// The choices so far, in the order they were made; none for communicators of another make.
std::vector<AllToAllChoice> all_to_all_choices(const Communicator& communicator);

}  // namespace anabranch
