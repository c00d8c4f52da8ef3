#include "support/random_routing.h"

#include "support/devices.h"

#include <algorithm>
#include <limits>
#include <numeric>

namespace anabranch::test {

const std::vector<Skew>& all_skews() {
  static const std::vector<Skew> skews = {Skew::kUniform, Skew::kZipf, Skew::kOneExpert,
                                          Skew::kEmptyExperts};
  return skews;
}

std::string to_string(Skew skew) {
  switch (skew) {
    case Skew::kUniform:
      return "uniform";
    case Skew::kZipf:
      return "zipf";
    case Skew::kOneExpert:
      return "one_expert";
    case Skew::kEmptyExperts:
      return "empty_experts";
  }
  return "?";
}

torch::Tensor skewed_preferences(Random& random, int64_t num_experts, int64_t top_k, Skew skew) {
  auto preferences = torch::zeros({num_experts}, torch::kFloat64);
  const auto favourites = random.permutation(num_experts);
  switch (skew) {
    case Skew::kUniform:
      break;
    case Skew::kZipf:
      preferences.index_put_({favourites},
                             -1.5 * torch::arange(1, num_experts + 1, torch::kFloat64).log());
      break;
    case Skew::kOneExpert:
      preferences[favourites[0].item<int64_t>()] = 1e3;
      break;
    case Skew::kEmptyExperts: {
      const auto used = std::max(top_k, (num_experts + 1) / 2);
      preferences.index_fill_(0, favourites.slice(0, used, num_experts),
                              -std::numeric_limits<double>::infinity());
      break;
    }
  }
  return preferences;
}

// Gumbel's trick: the top k of (log-preference + Gumbel noise) is a sample without replacement.
torch::Tensor random_expert_ids(Random& random, int64_t tokens, int64_t num_experts, int64_t top_k,
                                Skew skew) {
  const auto noise = -(-random.uniform({tokens, num_experts}).clamp_min(1e-12).log()).log();
  const auto scores = skewed_preferences(random, num_experts, top_k, skew) + noise;
  const auto chosen = std::get<1>(scores.topk(top_k, 1));
  return chosen.index_select(1, random.permutation(top_k)).contiguous();
}

const std::vector<Split>& all_splits() {
  static const std::vector<Split> splits = {Split::kEven, Split::kUneven, Split::kSomeEmpty,
                                            Split::kOnOneRank};
  return splits;
}

std::string to_string(Split split) {
  switch (split) {
    case Split::kEven:
      return "even";
    case Split::kUneven:
      return "uneven";
    case Split::kSomeEmpty:
      return "some_empty";
    case Split::kOnOneRank:
      return "on_one_rank";
  }
  return "?";
}

namespace {

std::vector<int64_t> even_split(int64_t tokens, size_t ranks) {
  const auto count = static_cast<int64_t>(ranks);
  std::vector<int64_t> counts(ranks, tokens / count);
  for (int64_t r = 0; r < tokens % count; ++r) {
    ++counts[static_cast<size_t>(r)];
  }
  return counts;
}

// Every token goes to one of `holders` at random.
std::vector<int64_t> random_split(Random& random, int64_t tokens, size_t ranks,
                                  const std::vector<size_t>& holders) {
  std::vector<int64_t> counts(ranks, 0);
  for (int64_t t = 0; t < tokens; ++t) {
    ++counts[random.pick(holders)];
  }
  return counts;
}

}  // namespace

std::vector<int64_t> split_tokens(Random& random, int64_t tokens, int ranks, Split split) {
  const auto size = static_cast<size_t>(ranks);
  std::vector<size_t> holders(size);
  std::iota(holders.begin(), holders.end(), size_t{0});
  if (split == Split::kEven) {
    return even_split(tokens, size);
  }
  if (split == Split::kSomeEmpty && size > 1) {
    holders.erase(holders.begin() + random.integer(0, ranks - 1));
  }
  if (split == Split::kOnOneRank) {
    holders = {random.pick(holders)};
  }
  return random_split(random, tokens, size, holders);
}

torch::Tensor shard(const torch::Tensor& batch, const std::vector<int64_t>& counts, int rank) {
  const auto begin = std::accumulate(counts.begin(), counts.begin() + rank, int64_t{0});
  return batch.slice(0, begin, begin + counts[static_cast<size_t>(rank)])
      .to(device(), batch.scalar_type(), /*non_blocking=*/false, /*copy=*/true);
}

}  // namespace anabranch::test
