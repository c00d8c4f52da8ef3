#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <atomic>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "kernels/cpu/rows_per_task.h"
#include "kernels/gate.h"
#include "kernels/routing.h"
#include "kernels/sinkhorn.h"
#include "kernels/score_sum.h"

namespace anabranch {
namespace {

/// Softmax of one token's `experts` logits into `probabilities`; returns the logsumexp, which is not
/// finite if any logit is not.
template <typename scalar_t>
scalar_t softmax(const scalar_t* logits, int64_t experts, scalar_t* probabilities) {
  const scalar_t largest = *std::max_element(logits, logits + experts);
  scalar_t sum = 0;
  scalar_t poison = 0;  // NaN if any logit is NaN or ±Inf
  for (int64_t e = 0; e < experts; ++e) {
    poison += logits[e] * 0;
    probabilities[e] = std::exp(logits[e] - largest);
    sum += probabilities[e];
  }
  for (int64_t e = 0; e < experts; ++e) {
    probabilities[e] /= sum;
  }
  return largest + std::log(sum) + poison;
}

/// The `top_k` best choices, best first, ties to the lowest number. `order` is scratch.
template <typename scalar_t>
void select(const scalar_t* choices, int64_t count, int64_t top_k, std::vector<int64_t>& order,
            int64_t* best) {
  order.resize(count);
  std::iota(order.begin(), order.end(), 0);
  std::partial_sort(order.begin(), order.begin() + top_k, order.end(), [&](int64_t a, int64_t b) {
    return choices[a] > choices[b] || (choices[a] == choices[b] && a < b);
  });
  std::copy_n(order.begin(), top_k, best);
}

/// A score of its own, and its derivative: of all but the softmax.
template <typename scalar_t>
struct Score {
  RouterScore kind;

  scalar_t of(scalar_t logit) const {
    if (kind == RouterScore::kSigmoid) {
      return 1 / (1 + std::exp(-logit));
    }
    return logit < kSmall ? std::exp(logit / 2) : std::sqrt(softplus(logit));
  }
  scalar_t slope(scalar_t logit, scalar_t score) const {
    if (kind == RouterScore::kSigmoid) {
      return score * (1 - score);
    }
    return logit < kSmall ? score / 2 : 1 / (1 + std::exp(-logit)) / (2 * score);
  }

 private:
  static constexpr scalar_t kSmall = kSmallSoftplusLogit;
  static scalar_t softplus(scalar_t x) {
    return std::max(x, scalar_t{0}) + std::log1p(std::exp(-std::abs(x)));
  }
};

bool is_expert(int64_t id, int64_t experts) { return id >= 0 && id < experts; }

void keep_minimum(std::atomic<int64_t>& minimum, int64_t value) {
  int64_t current = minimum.load();
  while (value < current && !minimum.compare_exchange_weak(current, value)) {
  }
}

/// Routes one token after another: what lies between is scratch.
template <typename scalar_t>
class TokenRouter {
 public:
  TokenRouter(const RoutingRule& rule, const torch::Tensor& expert_bias, Choice choice,
              int64_t experts)
      : rule_(rule),
        bias_(expert_bias.defined() ? expert_bias.const_data_ptr<scalar_t>() : nullptr),
        by_logits_(choice == Choice::kByBiasedLogits || chooses_by_logits(rule, expert_bias)),
        experts_(experts),
        scores_(experts),
        choices_(experts),
        group_scores_(rule.expert_groups),
        groups_(rule.expert_groups) {}

  /// Writes probabilities [E], ids [k], unless they are `chosen` [k] already, and weights [k]; returns the
  /// logsumexp, which is not finite, and the token not routed, where a logit or a biased score is not.
  scalar_t route(const scalar_t* logits, const int64_t* chosen, scalar_t* probabilities,
                 int64_t* ids, scalar_t* weights) {
    if (chosen != nullptr && chosen[0] == kOwnChoice) {
      chosen = nullptr;
    }
    scalar_t logsumexp = softmax(logits, experts_, probabilities);
    const scalar_t* scores = probabilities;
    if (rule_.router_score != RouterScore::kSoftmax) {
      normalized_scores(logits, probabilities);
      scores = scores_.data();
    }
    const scalar_t* choices = logits;  // in the order of their scores
    if (chosen == nullptr && (bias_ != nullptr || rule_.expert_groups > 1)) {
      logsumexp += choose_from(by_logits_ ? logits : scores);
      choices = choices_.data();
    }
    if (!std::isfinite(logsumexp)) [[unlikely]] {
      std::iota(ids, ids + rule_.top_k, 0);
      std::fill_n(weights, rule_.top_k, std::numeric_limits<scalar_t>::quiet_NaN());
      return logsumexp;
    }
    if (chosen != nullptr) {
      if (chosen != ids) std::copy_n(chosen, rule_.top_k, ids);
    } else {
      select(choices, experts_, rule_.top_k, order_, ids);
    }
    scalar_t sum = rule_.renormalize ? static_cast<scalar_t>(kLeastScoreSum) : scalar_t{1};
    for (int64_t slot = 0; slot < rule_.top_k; ++slot) {
      weights[slot] = is_expert(ids[slot], experts_) ? scores[ids[slot]] : scalar_t{0};
      sum += rule_.renormalize ? weights[slot] : 0;
    }
    for (int64_t slot = 0; slot < rule_.top_k; ++slot) {
      weights[slot] = weights[slot] / sum * static_cast<scalar_t>(rule_.routing_scale);
    }
    return logsumexp;
  }

 private:
  void normalized_scores(const scalar_t* logits, scalar_t* probabilities) {
    const Score<scalar_t> score{rule_.router_score};
    auto sum = static_cast<scalar_t>(kLeastScoreSum);
    for (int64_t e = 0; e < experts_; ++e) {
      scores_[e] = score.of(logits[e]);
      sum += scores_[e];
    }
    for (int64_t e = 0; e < experts_; ++e) {
      probabilities[e] = scores_[e] / sum;
    }
  }

  /// Biased scores of the experts of the best groups; returns NaN if one is not finite, else 0.
  scalar_t choose_from(const scalar_t* scores) {
    scalar_t poison = 0;
    for (int64_t e = 0; e < experts_; ++e) {
      choices_[e] = scores[e] + (bias_ != nullptr ? bias_[e] : 0);
      poison += choices_[e] * 0;
    }
    const int64_t size = experts_ / rule_.expert_groups;
    for (int64_t group = 0; group < rule_.expert_groups; ++group) {
      group_scores_[group] = group_score(choices_.data() + group * size, size);
    }
    select(group_scores_.data(), rule_.expert_groups, rule_.expert_groups, order_, groups_.data());
    for (int64_t i = rule_.top_groups; i < rule_.expert_groups; ++i) {
      std::fill_n(choices_.begin() + groups_[i] * size, size,
                  -std::numeric_limits<scalar_t>::infinity());
    }
    return poison;
  }

  scalar_t group_score(const scalar_t* choices, int64_t size) {
    best_.resize(std::min(summed_of_group(rule_), size));
    select(choices, size, static_cast<int64_t>(best_.size()), order_, best_.data());
    scalar_t sum = choices[best_[0]];
    for (size_t i = 1; i < best_.size(); ++i) {
      sum += choices[best_[i]];
    }
    return sum;
  }

  const RoutingRule& rule_;
  const scalar_t* bias_;
  bool by_logits_;
  int64_t experts_;
  std::vector<scalar_t> scores_;   // other than the softmax
  std::vector<scalar_t> choices_;  // biased, −Inf outside the best groups
  std::vector<scalar_t> group_scores_;
  std::vector<int64_t> groups_;  // best first
  std::vector<int64_t> best_;    // of a group
  std::vector<int64_t> order_;
};

template <typename T>
const T* address_or_null(const torch::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<T>() : nullptr;
}

template <typename scalar_t>
RouteResult route_tokens(const torch::Tensor& logits, const RoutingRule& rule,
                         const RoutingConditions& conditions, Choice choice) {
  const int64_t tokens = logits.size(0);
  const int64_t experts = logits.size(1);
  const int64_t top_k = rule.top_k;
  const auto index = logits.options().dtype(torch::kInt64);
  RouteResult result{
      choice == Choice::kMade ? conditions.expert_ids : at::empty({tokens, top_k}, index),
      at::empty({tokens, top_k}, logits.options()),
      at::empty_like(logits),
      at::empty({tokens}, logits.options()),
      at::zeros({experts}, index),
      at::empty({}, index),
      conditions.padding_mask};
  const bool* padding = address_or_null<bool>(conditions.padding_mask);
  const int64_t* chosen = address_or_null<int64_t>(conditions.expert_ids);
  const scalar_t* logit = logits.const_data_ptr<scalar_t>();
  int64_t* ids = result.expert_ids.data_ptr<int64_t>();
  scalar_t* weights = result.weights.data_ptr<scalar_t>();
  scalar_t* probabilities = result.probabilities.data_ptr<scalar_t>();
  scalar_t* logsumexp = result.logsumexp.data_ptr<scalar_t>();
  std::atomic<int64_t> first_nonfinite = tokens;

  at::parallel_for(0, tokens, rows_per_task(experts), [&](int64_t begin, int64_t end) {
    TokenRouter<scalar_t> router(rule, conditions.expert_bias, choice, experts);
    for (int64_t t = begin; t < end; ++t) {
      if (padding != nullptr && padding[t]) {
        std::fill_n(ids + t * top_k, top_k, -1);
        std::fill_n(weights + t * top_k, top_k, scalar_t{0});
        std::fill_n(probabilities + t * experts, experts, scalar_t{0});
        logsumexp[t] = 0;
        continue;
      }
      logsumexp[t] =
          router.route(logit + t * experts, chosen == nullptr ? nullptr : chosen + t * top_k,
                       probabilities + t * experts, ids + t * top_k, weights + t * top_k);
      if (!std::isfinite(logsumexp[t])) [[unlikely]] {
        keep_minimum(first_nonfinite, t);
      }
    }
  });

  int64_t* counts = result.counts.data_ptr<int64_t>();
  for (int64_t i = 0; i < tokens * top_k; ++i) {
    if (is_expert(ids[i], experts)) ++counts[ids[i]];
  }
  result.first_nonfinite_token.fill_(first_nonfinite == tokens ? -1 : first_nonfinite.load());
  return result;
}

/// One token's gradients: those that come, and the loss's at the chosen scores.
template <typename scalar_t>
struct TokenGradient {
  const RoutingRule& rule;
  int64_t experts;
  const int64_t* ids;
  const scalar_t* weights;
  const scalar_t* dweights;
  const scalar_t* dprobability_sum;
  scalar_t dlogsumexp;

  /// dscores [E] += dL/ds through the weights: w = c·s / (Σ s + ε) or c·s.
  void add_through_weights(const scalar_t* scores, scalar_t* dscores) const {
    scalar_t inner = 0;
    scalar_t sum = 1;
    if (rule.renormalize) {
      sum = static_cast<scalar_t>(kLeastScoreSum);
      for (int64_t slot = 0; slot < rule.top_k; ++slot) {
        inner += dweights[slot] * weights[slot];
        sum += is_expert(ids[slot], experts) ? scores[ids[slot]] : 0;
      }
    }
    const auto scale = static_cast<scalar_t>(rule.routing_scale);
    for (int64_t slot = 0; slot < rule.top_k; ++slot) {
      if (is_expert(ids[slot], experts)) {
        dscores[ids[slot]] += (scale * dweights[slot] - inner) / sum;
      }
    }
  }

  /// With p the softmax and dp = dL/dp through the weights and the probability sum:
  /// dlogit = p (dp − ⟨p, dp⟩) + p · dL/dlogsumexp.
  void of_softmax(const scalar_t* p, scalar_t* dlogits) const {
    std::copy_n(dprobability_sum, experts, dlogits);
    add_through_weights(p, dlogits);
    const scalar_t mean = std::inner_product(p, p + experts, dlogits, scalar_t{0});
    for (int64_t e = 0; e < experts; ++e) {
      dlogits[e] = p[e] * (dlogits[e] - mean + dlogsumexp);
    }
  }

  /// With s the scores, s' their derivatives, q = s / (Σ s + ε) and ds = dL/ds through the weights:
  /// dlogit = s' (ds + (dq − ⟨q, dq⟩) / (Σ s + ε)) + softmax · dL/dlogsumexp.
  void of_scores(const scalar_t* logits, scalar_t logsumexp, std::vector<scalar_t>& scores,
                 scalar_t* dlogits) const {
    const Score<scalar_t> score{rule.router_score};
    auto sum = static_cast<scalar_t>(kLeastScoreSum);
    scalar_t inner = 0;
    for (int64_t e = 0; e < experts; ++e) {
      scores[e] = score.of(logits[e]);
      sum += scores[e];
      inner += scores[e] * dprobability_sum[e];
    }
    for (int64_t e = 0; e < experts; ++e) {
      dlogits[e] = (dprobability_sum[e] - inner / sum) / sum;
    }
    add_through_weights(scores.data(), dlogits);
    for (int64_t e = 0; e < experts; ++e) {
      dlogits[e] = score.slope(logits[e], scores[e]) * dlogits[e] +
                   std::exp(logits[e] - logsumexp) * dlogsumexp;
    }
  }
};

template <typename scalar_t>
torch::Tensor route_backward_tokens(const RouteResult& routed, const RoutingRule& rule,
                                    const torch::Tensor& dweights,
                                    const torch::Tensor& dprobability_sum,
                                    scalar_t dsquared_logsumexp_sum) {
  const int64_t tokens = routed.probabilities.size(0);
  const int64_t experts = routed.probabilities.size(1);
  torch::Tensor dlogits = at::empty_like(routed.probabilities);
  const int64_t* ids = routed.expert_ids.const_data_ptr<int64_t>();
  const scalar_t* weights = routed.weights.const_data_ptr<scalar_t>();
  const scalar_t* saved = routed.probabilities.const_data_ptr<scalar_t>();
  const scalar_t* logsumexp = routed.logsumexp.const_data_ptr<scalar_t>();
  const scalar_t* dweight = dweights.const_data_ptr<scalar_t>();
  const scalar_t* dsum = dprobability_sum.const_data_ptr<scalar_t>();
  scalar_t* dlogit = dlogits.data_ptr<scalar_t>();
  const bool softmax = rule.router_score == RouterScore::kSoftmax;
  const int64_t sequences = dprobability_sum.dim() == 2 ? dprobability_sum.size(0) : 1;
  const int64_t length = sequences > 0 ? tokens / sequences : 0;
  const bool* padding = address_or_null<bool>(routed.padding_mask);

  at::parallel_for(0, tokens, rows_per_task(experts), [&](int64_t begin, int64_t end) {
    std::vector<scalar_t> scores(softmax ? 0 : experts);
    for (int64_t t = begin; t < end; ++t) {
      if (padding != nullptr && padding[t]) {
        std::fill_n(dlogit + t * experts, experts, scalar_t{0});
        continue;
      }
      const int64_t slot = t * rule.top_k;
      const TokenGradient<scalar_t> token{rule,
                                          experts,
                                          ids + slot,
                                          weights + slot,
                                          dweight + slot,
                                          dsum + t / length * experts,
                                          2 * logsumexp[t] * dsquared_logsumexp_sum};
      if (!softmax) {
        token.of_scores(saved + t * experts, logsumexp[t], scores, dlogit + t * experts);
      } else {
        token.of_softmax(saved + t * experts, dlogit + t * experts);
      }
    }
  });
  return dlogits;
}

/// Of the tokens of one sequence those that one expert takes.
template <typename scalar_t>
class TokenChooser {
 public:
  /// `scores` and `ids` [length, E], from the expert's column on; `padding` may be null.
  void choose(const scalar_t* scores, const bool* padding, int64_t length, int64_t experts,
              int64_t top_k, int64_t expert, int64_t* ids) {
    best_.clear();
    for (int64_t t = 0; t < length; ++t) {
      const scalar_t score = scores[t * experts];
      if ((padding == nullptr || !padding[t]) && !std::isnan(score)) best_.emplace_back(-score, t);
    }
    const auto tokens = static_cast<int64_t>(best_.size());
    const int64_t taken = std::min(tokens, (tokens * top_k + experts - 1) / experts);
    std::nth_element(best_.begin(), best_.begin() + taken, best_.end());
    for (int64_t i = 0; i < taken; ++i) ids[best_[i].second * experts] = expert;
  }

 private:
  std::vector<std::pair<scalar_t, int64_t>> best_;  // scores negated, tokens
};

class CpuRoutingKernels final : public RoutingKernels {
 public:
  RouteResult route(const torch::Tensor& logits, const RoutingRule& rule,
                    const RoutingConditions& conditions, Choice choice) const override {
    return AT_DISPATCH_FLOATING_TYPES(logits.scalar_type(), "route", [&] {
      return route_tokens<scalar_t>(logits, rule, conditions, choice);
    });
  }

  RoutingSums routing_sums(const torch::Tensor& probabilities, const torch::Tensor& logsumexp,
                           int64_t sequences) const override {
    const int64_t experts = probabilities.size(1);
    return {
        probabilities.sum(0), logsumexp.square().sum(),
        sequences == 0
            ? at::empty({0, experts}, probabilities.options())
            : probabilities.view({sequences, probabilities.size(0) / sequences, experts}).sum(1)};
  }

  torch::Tensor sequence_counts(const torch::Tensor& expert_ids, int64_t sequences, int64_t experts,
                                torch::Dtype dtype) const override {
    const auto valid = expert_ids.ge(0).logical_and_(expert_ids.lt(experts));
    const auto places = expert_ids.where(valid, experts);  // a column of those that are none
    const auto options = expert_ids.options().dtype(dtype);
    return at::zeros({sequences, experts + 1}, options)
        .scatter_add_(1, places.view({sequences, -1}),
                      at::ones_like(places, options).view({sequences, -1}))
        .narrow(1, 0, experts);
  }

  torch::Tensor batch_sums(const torch::Tensor& counts, int64_t tokens,
                           const RoutingSums& sums) const override {
    const auto wide = counts.options().dtype(torch::kFloat64);
    return at::cat({counts.to(torch::kFloat64), at::full({1}, static_cast<double>(tokens), wide),
                    sums.probabilities.to(torch::kFloat64),
                    sums.squared_logsumexp.reshape(1).to(torch::kFloat64)});
  }

  BatchLosses batch_losses(const torch::Tensor& sums, const torch::Tensor& chosen, int64_t top_k,
                           torch::Dtype dtype) const override {
    const int64_t experts = chosen.size(0);
    const auto tokens = sums.select(0, experts).clamp_min(1);
    const double scale = static_cast<double>(experts) / static_cast<double>(top_k);
    const auto slope = chosen * scale / tokens.square();
    return {sums.narrow(0, 0, experts).to(torch::kInt64),
            (slope * sums.narrow(0, experts + 1, experts)).sum().to(dtype),
            (sums.select(0, 2 * experts + 1) / tokens).to(dtype), slope, tokens.reciprocal()};
  }

  BatchLosses losses_of_one(const torch::Tensor& counts, int64_t tokens, const RoutingSums& sums,
                            int64_t top_k) const override {
    const auto of_batch = batch_sums(counts, tokens, sums);
    return batch_losses(of_batch, of_batch.narrow(0, 0, counts.size(0)), top_k,
                        sums.probabilities.scalar_type());
  }

  torch::Tensor bias_histogram(const torch::Tensor& scores, const RoutingRule& rule,
                               const RoutingConditions& conditions) const override {
    const int64_t experts = scores.size(1);
    const auto index = scores.options().dtype(torch::kInt64);
    if (rule.top_k == experts) {  // whatever the biases, all have the same
      return at::zeros({experts, kBiasBins}, index);
    }
    const auto& bias = conditions.expert_bias;
    const auto best = std::get<0>((scores + bias).topk(rule.top_k + 1, 1));
    const auto wanted = best.narrow(1, rule.top_k, 1) - scores;
    const auto least = bias.min() - 1;
    const auto bins = ((wanted - least) * (kBiasBins / (bias.max() + 1 - least)))
                          .to(torch::kInt64)
                          .clamp(0, kBiasBins - 1)
                          .add_(at::arange(experts, index) * kBiasBins);
    auto counted = wanted.isfinite().all(1);
    if (conditions.padding_mask.defined()) {
      counted = counted.logical_and(conditions.padding_mask.logical_not());
    }
    return bins.index({counted}).flatten().bincount({}, experts * kBiasBins).view({experts, -1});
  }

  torch::Tensor sinkhorn_bias(const torch::Tensor& logits,
                              const torch::Tensor& left_out) const override {
    auto none = logits.isfinite().all(1).logical_not();
    if (left_out.defined()) none = none.logical_or(left_out);
    none = none.unsqueeze(1);  // [T, 1]
    const auto known = logits.masked_fill(none, 0);
    auto bias = at::zeros({logits.size(1)}, logits.options());
    for (int64_t round = 0; round < kSinkhornRounds; ++round) {
      const auto sums = at::softmax(known + bias, 1).masked_fill_(none, 0).sum(0);
      const auto mean = sums.mean();
      const auto farthest = (sums - mean).abs().max();
      if (farthest.le(kSinkhornTolerance * mean).item<bool>()) break;
      bias += (mean / sums.clamp_min(kLeastSinkhornSum)).log();
    }
    return bias - bias.mean();
  }

  torch::Tensor choose_tokens(const torch::Tensor& logits, const RoutingRule& rule,
                              const torch::Tensor& padding_mask, int64_t sequences) const override {
    const auto scores =
        rule.router_score == RouterScore::kSoftmax ? at::softmax(logits, 1) : logits;
    const int64_t experts = scores.size(1);
    const int64_t length = scores.size(0) / sequences;
    auto ids = at::full(scores.sizes(), -1, scores.options().dtype(torch::kInt64));
    const bool* padding = address_or_null<bool>(padding_mask);
    AT_DISPATCH_FLOATING_TYPES(scores.scalar_type(), "choose_tokens", [&] {
      const scalar_t* score = scores.const_data_ptr<scalar_t>();
      int64_t* id = ids.data_ptr<int64_t>();
      at::parallel_for(
          0, sequences * experts, rows_per_task(length), [&](int64_t begin, int64_t end) {
            TokenChooser<scalar_t> chooser;
            for (int64_t i = begin; i < end; ++i) {
              const int64_t first = i / experts * length;
              const int64_t expert = i % experts;
              chooser.choose(score + first * experts + expert,
                             padding == nullptr ? nullptr : padding + first, length, experts,
                             rule.top_k, expert, id + first * experts + expert);
            }
          });
    });
    return ids;
  }

  torch::Tensor route_backward(const RouteResult& routed, const RoutingRule& rule,
                               const torch::Tensor& dweights, const torch::Tensor& dprobability_sum,
                               const torch::Tensor& dsquared_logsumexp_sum,
                               bool split) const override {
    const auto dlogits =
        AT_DISPATCH_FLOATING_TYPES(routed.weights.scalar_type(), "route_backward", [&] {
          return route_backward_tokens<scalar_t>(
              routed, rule, dweights,
              dprobability_sum.defined()
                  ? dprobability_sum
                  : at::zeros({routed.probabilities.size(1)}, routed.weights.options()),
              dsquared_logsumexp_sum.defined() ? dsquared_logsumexp_sum.item<scalar_t>()
                                               : scalar_t(0));
        });
    return split ? GateKernels::cpu().split(dlogits, kSplitGradient, /*side_by_side=*/true)
                 : dlogits;
  }
};

}  // namespace

const RoutingKernels& RoutingKernels::cpu() {
  static const CpuRoutingKernels kernels;
  return kernels;
}

}  // namespace anabranch
