#include "routing/rule.h"

#include <cmath>

#include "support/check.h"

namespace anabranch {
namespace {

/// A lane of a GPU's warp for each.
constexpr int64_t kMostGroups = 32;

void check_groups(const RoutingRule& rule, int64_t experts, const char* where) {
  const int64_t groups = rule.expert_groups;
  check_input(groups >= 1 && groups <= kMostGroups && experts % groups == 0, where,
              ": expert_groups = ", groups, " with ", experts, " experts, expected 1 to ",
              kMostGroups, " groups of equal size");
  check_input(rule.top_groups >= 1 && rule.top_groups <= groups, where,
              ": top_groups = ", rule.top_groups, " of ", groups,
              " groups, expected 1 ≤ top_groups ≤ expert_groups");
  check_input(rule.top_k <= experts / groups * rule.top_groups, where, ": top_k = ", rule.top_k,
              " from top_groups = ", rule.top_groups, " groups of ", experts / groups, " experts");
  check_input(groups == 1 || rule.group_score != GroupScore::kTopTwoSum || experts / groups >= 2,
              where, ": group_score kTopTwoSum with groups of one expert, expected two or more");
  const bool by_share = rule.group_score == GroupScore::kTopShareSum ||
                        rule.group_score == GroupScore::kTopShareLogitSum;
  check_input(groups == 1 || !by_share || rule.top_k >= rule.top_groups, where,
              ": group_score of a share of top_k = ", rule.top_k,
              " with top_groups = ", rule.top_groups, ", expected top_k of at least top_groups");
  check_input(groups == 1 || rule.group_score != GroupScore::kTopShareLogitSum ||
                  rule.router_score == RouterScore::kSoftmax,
              where, ": group_score kTopShareLogitSum with scores other than softmax");
}

}  // namespace

RoutingRule routing_rule(const MoEOptions& options) {
  return {options.top_k,         options.renormalize, options.router_score, options.routing_scale,
          options.expert_groups, options.top_groups,  options.group_score};
}

void check_rule(const RoutingRule& rule, int64_t experts, const char* where) {
  check_input(rule.top_k >= 1 && rule.top_k <= experts, where, ": top_k = ", rule.top_k, " with ",
              experts, " experts, expected 1 ≤ top_k ≤ the number of experts");
  check_input(std::isfinite(rule.routing_scale) && rule.routing_scale > 0, where,
              ": routing_scale = ", rule.routing_scale, ", expected a number above 0");
  check_groups(rule, experts, where);
}

}  // namespace anabranch
