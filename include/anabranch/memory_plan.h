#pragma once

#include <anabranch/options.h>

#include <cstdint>
#include <string>
#include <vector>

namespace anabranch {

/// The memory of one rank's layer over a step, in bytes of its device's tensors, as plan_memory foresees it.
/// Not in it: the step's input and the gradient of its output, which are the caller's; an optimizer's state;
/// what libraries keep for themselves (NCCL, cuBLAS, the allocator's unused blocks).
struct MemoryPlan {
  /// Memory, and what it is for.
  struct Item {
    std::string name;
    int64_t bytes = 0;
  };
  std::vector<Item> parameters;  ///< of this rank
  std::vector<Item> saved;       ///< alive between forward and backward, the output included
  std::vector<Item> forward;     ///< alive beside the parameters when forward has most
  std::vector<Item> backward;    ///< the same of backward, which leaves the gradients
  std::vector<Item> mailboxes;   ///< that peers on one host map; once for all layers of a group

  /// At the step's fullest moment.
  int64_t peak() const;
  /// As a table for people.
  std::string explain() const;
};

/// The sum of their bytes.
int64_t total_bytes(const std::vector<MemoryPlan::Item>& items);

/// What the rank of `ranks` that holds most of experts needs for a training step with `tokens` tokens on every rank.
/// `load`: the assignments that its experts receive, over those of a rank in perfect balance, which of slices are as
/// many times as many as it takes to make an expert; 1 is balance, and no routing has more than `ranks` · min(top_k, its experts) / top_k. With a
/// receive_capacity that is the load. GPUs of up to 8 ranks are taken to be on one host, all rows to come in one
/// round (`receive_rows_limit`), and no weights of experts to travel (`balance`). Throws InputError for options
/// that no layer can have.
MemoryPlan plan_memory(const MoEOptions& options, int64_t tokens, int64_t ranks = 1,
                       double load = 1.0);

}  // namespace anabranch
