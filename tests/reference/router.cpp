#include "reference/router.h"

#include <torch/torch.h>

#include <cmath>
#include <limits>

namespace anabranch::reference {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

/// A stable descending sort keeps equals in the order of their numbers.
std::pair<torch::Tensor, torch::Tensor> sorted(const torch::Tensor& values) {
  const auto [best, order] = values.detach().sort(/*stable=*/true, /*dim=*/1, /*descending=*/true);
  return {best, order};
}

/// [T] between the k-th and the next.
torch::Tensor gap(const torch::Tensor& values, int64_t k) {
  if (k >= values.size(1)) {
    return torch::full({values.size(0)}, kInfinity, values.options().requires_grad(false));
  }
  const auto best = sorted(values).first;
  return best.select(1, k - 1) - best.select(1, k);
}

/// [T]: least distance between two of the k + 1 largest that follow one another, for their order
/// counts; over `scale` [T, 1], or over the larger of the two where that is undefined.
torch::Tensor least_gap(const torch::Tensor& values, int64_t k, const torch::Tensor& scale) {
  const auto best = sorted(values).first.slice(1, 0, k + 1);
  if (best.size(1) < 2) {
    return torch::full({values.size(0)}, kInfinity, values.options().requires_grad(false));
  }
  const auto larger = best.slice(1, 0, -1);
  return ((larger - best.slice(1, 1)) / (scale.defined() ? scale : larger))
      .nan_to_num(kInfinity)
      .amin(1);
}

/// [T, groups]
torch::Tensor group_scores(const torch::Tensor& choices, const RoutingFormula& formula) {
  const auto grouped = choices.unflatten(1, {formula.groups, choices.size(1) / formula.groups});
  switch (formula.group_score) {
    case GroupScore::kMaximum:
      return grouped.amax(2);
    case GroupScore::kTopTwoSum:
      return std::get<0>(grouped.topk(2, /*dim=*/2)).sum(2);
    default:
      return std::get<0>(grouped.topk(formula.top_k / formula.top_groups, /*dim=*/2)).sum(2);
  }
}

torch::Tensor scores_of(const torch::Tensor& logits, RouterScore score) {
  switch (score) {
    case RouterScore::kSoftmax:
      return torch::softmax(logits, 1);
    case RouterScore::kSigmoid:
      return 1 / (1 + (-logits).exp());
    default:
      return (1 + logits.exp()).log().sqrt();
  }
}

}  // namespace

RoutingFormula formula_of(const MoEOptions& options, const torch::Tensor& expert_bias) {
  return {.top_k = options.top_k,
          .renormalize = options.renormalize,
          .score = options.router_score,
          .scale = options.routing_scale,
          .groups = options.expert_groups,
          .top_groups = options.top_groups,
          .group_score = options.group_score,
          .expert_bias = expert_bias};
}

Choice choose(const torch::Tensor& logits, const RoutingFormula& formula) {
  const int64_t tokens = logits.size(0);
  const bool softmax = formula.score == RouterScore::kSoftmax;
  const auto scores = scores_of(logits, formula.score);
  const bool by_score =
      formula.expert_bias.defined() ||
      (formula.groups > 1 && formula.group_score != GroupScore::kTopShareLogitSum);
  auto choices = by_score ? scores.detach() : logits.detach();
  auto margin = torch::full({tokens}, kInfinity, choices.options());
  if (formula.expert_bias.defined()) {
    choices = choices + formula.expert_bias;
  }
  // Logits have been rounded before; scores are, in proportion to themselves, or to what they are
  // with a bias, of which they may be a small rest.
  torch::Tensor scale;
  if (!by_score) {
    scale = torch::ones({tokens, 1}, choices.options());
  } else if (formula.expert_bias.defined()) {
    scale = choices.abs().amax(1, /*keepdim=*/true);
  }
  if (formula.groups > 1) {
    const auto of_groups = group_scores(choices, formula);
    margin = gap(of_groups, formula.top_groups) / of_groups.abs().amax(1);
    const auto best = sorted(of_groups).second.slice(1, 0, formula.top_groups);
    const auto kept = torch::zeros_like(of_groups, torch::kBool).scatter(1, best, true);
    const int64_t size = logits.size(1) / formula.groups;
    choices = choices.masked_fill(kept.repeat_interleave(size, 1).logical_not(), -kInfinity);
  }
  margin = torch::minimum(margin, least_gap(choices, formula.top_k, scale));
  Choice choice;
  choice.probabilities = softmax ? scores : scores / scores.sum(1, /*keepdim=*/true);
  choice.expert_ids = sorted(choices).second.slice(1, 0, formula.top_k).contiguous();
  choice.weights = scores.gather(1, choice.expert_ids);
  if (formula.renormalize) {
    choice.weights = choice.weights / (choice.weights.sum(1, /*keepdim=*/true) + 1e-20);
  }
  choice.weights = choice.weights * formula.scale;
  choice.margin = margin;
  return choice;
}

torch::Tensor smooth_load(const torch::Tensor& clean, const torch::Tensor& noisy,
                          const torch::Tensor& deviation, int64_t top_k) {
  const int64_t experts = clean.size(1);
  auto load = torch::zeros({experts}, clean.options().requires_grad(false));
  for (int64_t t = 0; t < clean.size(0); ++t) {
    std::vector<torch::Tensor> probabilities;
    for (int64_t e = 0; e < experts; ++e) {
      if (top_k == experts) {
        probabilities.push_back(torch::ones({}, load.options()));
        continue;
      }
      const auto others = torch::cat({noisy[t].slice(0, 0, e), noisy[t].slice(0, e + 1, experts)});
      const auto threshold = std::get<0>(others.sort(0, /*descending=*/true))[top_k - 1];
      const auto z = (clean[t][e] - threshold) / deviation[t][e];
      probabilities.push_back(0.5 * (1 + (z * M_SQRT1_2).erf()));
    }
    load = load + torch::stack(probabilities);
  }
  return load;
}

torch::Tensor squared_variation(const torch::Tensor& values) {
  // As in the authors' code, where all may be 0.
  return values.var(/*unbiased=*/false) / (values.mean().square() + 1e-10);
}

}  // namespace anabranch::reference
