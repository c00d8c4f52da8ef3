#include "support/routing_case.h"

#include <c10/util/StringUtil.h>

#include <algorithm>

#include "support/devices.h"

namespace anabranch::test {

std::string RoutingCase::describe() const {
  return c10::str("E ", num_experts, " top_k ", top_k, " tokens ", tokens, " (",
                  c10::Join("+", counts), ") ", to_string(skew), " ", to_string(split));
}

RoutingCase make_routing_case(Random& random, int ranks, int64_t num_experts, int64_t top_k,
                              int64_t tokens, Skew skew, Split split) {
  RoutingCase result;
  result.num_experts = num_experts;
  result.top_k = top_k;
  result.tokens = tokens;
  result.skew = skew;
  result.split = split;
  result.counts = split_tokens(random, tokens, ranks, split);
  result.expert_ids = random_expert_ids(random, tokens, num_experts, top_k, skew);
  return result;
}

std::vector<RoutingCase> routing_cases(Random& random, int ranks, int64_t sample) {
  std::vector<RoutingCase> cases;
  const auto add = [&](int64_t num_experts, int64_t top_k, int64_t tokens, Skew skew, Split split) {
    cases.push_back(make_routing_case(random, ranks, num_experts, top_k, tokens, skew, split));
  };
  add(8, 2, 0, Skew::kUniform, Split::kEven);         // nobody has anything
  add(1, 1, 5, Skew::kUniform, Split::kUneven);       // one expert: most ranks own none
  add(2, 2, 9, Skew::kUniform, Split::kSomeEmpty);    // W > E
  add(5, 5, 17, Skew::kUniform, Split::kUneven);      // every token to every expert
  add(16, 16, 6, Skew::kUniform, Split::kOnOneRank);  // the same, from one rank
  add(8, 1, 40, Skew::kOneExpert, Split::kEven);      // one expert takes all
  add(16, 3, 40, Skew::kOneExpert, Split::kSomeEmpty);
  add(8, 2, 1, Skew::kZipf, Split::kOnOneRank);  // a single token
  for (int64_t i = 0; i < sample; ++i) {
    const auto num_experts = random.pick<int64_t>({1, 2, 3, 5, 8, 16});
    const auto top_k = random.integer(1, num_experts);
    add(num_experts, top_k, random.integer(0, 60), random.pick(all_skews()),
        random.pick(all_splits()));
  }
  return cases;
}

Routing routing_of(const torch::Tensor& expert_ids) {
  Routing routing;
  routing.expert_ids = on_device(expert_ids);
  routing.weights = on_device(torch::ones(expert_ids.sizes(), torch::kFloat32));
  return routing;
}

}  // namespace anabranch::test
