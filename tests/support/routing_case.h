#pragma once

#include <anabranch/routing.h>

#include <string>
#include <vector>

#include "support/random_routing.h"

namespace anabranch::test {

/// A routed global batch, the same on every rank, and how it lies over them.
struct RoutingCase {
  int64_t num_experts = 0;
  int64_t top_k = 0;
  int64_t tokens = 0;
  Skew skew = Skew::kUniform;
  Split split = Split::kEven;
  std::vector<int64_t> counts;  ///< [W] tokens of each rank
  torch::Tensor expert_ids;     ///< [tokens, top_k], the ranks' one after another

  std::string describe() const;
  /// This rank's rows of a [tokens, ...] tensor, on the test's device.
  torch::Tensor local(const torch::Tensor& batch, int rank) const {
    return shard(batch, counts, rank);
  }
};

RoutingCase make_routing_case(Random& random, int ranks, int64_t num_experts, int64_t top_k,
                              int64_t tokens, Skew skew, Split split);

/// Corners that a random draw may miss, then `sample` random ones.
std::vector<RoutingCase> routing_cases(Random& random, int ranks, int64_t sample);

/// Those experts' ids [T, top_k] with weights of one, on the test's device.
Routing routing_of(const torch::Tensor& expert_ids);

}  // namespace anabranch::test
