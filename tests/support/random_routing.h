#pragma once

#include "support/random.h"

#include <string>
#include <vector>

namespace anabranch::test {

/// How tokens favour experts.
enum class Skew {
  kUniform,
  kZipf,          ///< the r-th favourite is chosen ∝ r^−1.5
  kOneExpert,     ///< every token goes to one and the same expert (and to top_k − 1 others)
  kEmptyExperts,  ///< about half of the experts get nothing
};
const std::vector<Skew>& all_skews();
std::string to_string(Skew skew);

/// [E] log-preferences that produce `skew`; -inf for an expert never chosen.
torch::Tensor skewed_preferences(Random& random, int64_t num_experts, int64_t top_k, Skew skew);

/// [T, top_k] int64, distinct within a token, the slots in no particular order.
torch::Tensor random_expert_ids(Random& random, int64_t tokens, int64_t num_experts, int64_t top_k,
                                Skew skew);

/// How a global batch lies over the ranks.
enum class Split {
  kEven,
  kUneven,
  kSomeEmpty,  ///< at least one rank holds nothing (with more than one rank)
  kOnOneRank,
};
const std::vector<Split>& all_splits();
std::string to_string(Split split);

/// [ranks] token counts that sum to `tokens`.
std::vector<int64_t> split_tokens(Random& random, int64_t tokens, int ranks, Split split);

/// The rows of `batch` (dimension 0) that `rank` holds, as a copy on the test's device.
torch::Tensor shard(const torch::Tensor& batch, const std::vector<int64_t>& counts, int rank);

}  // namespace anabranch::test
