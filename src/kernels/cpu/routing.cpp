#include <ATen/Dispatch.h>

#include <atomic>
#include <cmath>
#include <numeric>

#include "kernels/cpu/cpu_kernels.h"

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

/// The `top_k` experts with the largest logits, largest first, ties to the lowest id.
template <typename scalar_t>
void select(const scalar_t* logits, int64_t top_k, std::vector<int64_t>& order, int64_t* ids) {
  std::iota(order.begin(), order.end(), 0);
  std::partial_sort(order.begin(), order.begin() + top_k, order.end(), [&](int64_t a, int64_t b) {
    return logits[a] > logits[b] || (logits[a] == logits[b] && a < b);
  });
  std::copy_n(order.begin(), top_k, ids);
}

void keep_minimum(std::atomic<int64_t>& minimum, int64_t value) {
  int64_t current = minimum.load();
  while (value < current && !minimum.compare_exchange_weak(current, value)) {
  }
}

template <typename scalar_t>
RouteResult route_tokens(const torch::Tensor& logits, int64_t top_k, bool renormalize) {
  const int64_t tokens = logits.size(0);
  const int64_t experts = logits.size(1);
  const auto index = logits.options().dtype(torch::kInt64);
  RouteResult result{at::empty({tokens, top_k}, index),
                     at::empty({tokens, top_k}, logits.options()),
                     at::empty_like(logits),
                     at::empty({tokens}, logits.options()),
                     at::zeros({experts}, index),
                     at::empty({}, index)};
  const scalar_t* logit = logits.const_data_ptr<scalar_t>();
  int64_t* ids = result.expert_ids.data_ptr<int64_t>();
  scalar_t* weights = result.weights.data_ptr<scalar_t>();
  scalar_t* probabilities = result.probabilities.data_ptr<scalar_t>();
  scalar_t* logsumexp = result.logsumexp.data_ptr<scalar_t>();
  std::atomic<int64_t> first_nonfinite = tokens;

  at::parallel_for(0, tokens, rows_per_task(experts), [&](int64_t begin, int64_t end) {
    std::vector<int64_t> order(experts);
    for (int64_t t = begin; t < end; ++t) {
      scalar_t* p = probabilities + t * experts;
      scalar_t* w = weights + t * top_k;
      int64_t* id = ids + t * top_k;
      logsumexp[t] = softmax(logit + t * experts, experts, p);
      if (!std::isfinite(logsumexp[t])) [[unlikely]] {
        keep_minimum(first_nonfinite, t);
        std::iota(id, id + top_k, 0);
        std::fill_n(w, top_k, scalar_t{0});
        continue;
      }
      select(logit + t * experts, top_k, order, id);
      scalar_t sum = 0;
      for (int64_t slot = 0; slot < top_k; ++slot) {
        w[slot] = p[id[slot]];
        sum += w[slot];
      }
      for (int64_t slot = 0; renormalize && slot < top_k; ++slot) {
        w[slot] /= sum;
      }
    }
  });

  int64_t* counts = result.counts.data_ptr<int64_t>();
  for (int64_t i = 0; i < tokens * top_k; ++i) {
    ++counts[ids[i]];
  }
  result.first_nonfinite_token.fill_(first_nonfinite == tokens ? -1 : first_nonfinite.load());
  return result;
}

/// With p the softmax, w the weights and L the loss: dp = dL/dp through the selected weights and the
/// probability sum, then dlogit = p (dp − ⟨p, dp⟩) + 2 · logsumexp · p · dL/d(Σ logsumexp²).
template <typename scalar_t>
torch::Tensor route_backward_tokens(const RouteResult& routed, bool renormalize,
                                    const torch::Tensor& dweights,
                                    const torch::Tensor& dprobability_sum,
                                    scalar_t dsquared_logsumexp_sum) {
  const int64_t experts = routed.probabilities.size(1);
  const int64_t top_k = routed.expert_ids.size(1);
  torch::Tensor dlogits = at::empty_like(routed.probabilities);
  const int64_t* ids = routed.expert_ids.const_data_ptr<int64_t>();
  const scalar_t* weights = routed.weights.const_data_ptr<scalar_t>();
  const scalar_t* probabilities = routed.probabilities.const_data_ptr<scalar_t>();
  const scalar_t* logsumexp = routed.logsumexp.const_data_ptr<scalar_t>();
  const scalar_t* dweight = dweights.const_data_ptr<scalar_t>();
  const scalar_t* dsum = dprobability_sum.const_data_ptr<scalar_t>();
  scalar_t* dlogit = dlogits.data_ptr<scalar_t>();

  const int64_t tokens = routed.probabilities.size(0);
  at::parallel_for(0, tokens, rows_per_task(experts), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t* id = ids + t * top_k;
      const scalar_t* w = weights + t * top_k;
      const scalar_t* dw = dweight + t * top_k;
      const scalar_t* p = probabilities + t * experts;
      scalar_t* d = dlogit + t * experts;
      std::copy_n(dsum, experts, d);
      if (renormalize) {  // w = p / s, s = Σ selected p: dp = (dw − ⟨dw, w⟩) / s
        scalar_t inner = 0;
        scalar_t sum = 0;
        for (int64_t slot = 0; slot < top_k; ++slot) {
          inner += dw[slot] * w[slot];
          sum += p[id[slot]];
        }
        for (int64_t slot = 0; slot < top_k; ++slot) {
          d[id[slot]] += (dw[slot] - inner) / sum;
        }
      } else {
        for (int64_t slot = 0; slot < top_k; ++slot) {
          d[id[slot]] += dw[slot];
        }
      }
      const scalar_t mean = std::inner_product(p, p + experts, d, scalar_t{0});
      const scalar_t dlogsumexp = 2 * logsumexp[t] * dsquared_logsumexp_sum;
      for (int64_t e = 0; e < experts; ++e) {
        d[e] = p[e] * (d[e] - mean + dlogsumexp);
      }
    }
  });
  return dlogits;
}

}  // namespace

RouteResult CpuKernels::route(const torch::Tensor& logits, int64_t top_k, bool renormalize) const {
  return AT_DISPATCH_FLOATING_TYPES(logits.scalar_type(), "route", [&] {
    return route_tokens<scalar_t>(logits, top_k, renormalize);
  });
}

torch::Tensor CpuKernels::route_backward(const RouteResult& routed, bool renormalize,
                                         const torch::Tensor& dweights,
                                         const torch::Tensor& dprobability_sum,
                                         const torch::Tensor& dsquared_logsumexp_sum) const {
  return AT_DISPATCH_FLOATING_TYPES(routed.weights.scalar_type(), "route_backward", [&] {
    return route_backward_tokens<scalar_t>(routed, renormalize, dweights, dprobability_sum,
                                           dsquared_logsumexp_sum.item<scalar_t>());
  });
}

}  // namespace anabranch
