#include "model/latent_attention.h"

#include <ATen/ATen.h>

#include <cmath>

#include "model/heads.h"
#include "model/yarn.h"

namespace train_lm {
namespace {

constexpr double kNarrowEpsilon = 1e-6;  // of the narrow vectors' norms, whatever the others' is

torch::Tensor narrow_norm(const torch::Tensor& x, const torch::Tensor& weight) {
  return at::rms_norm(x, weight.sizes(), weight, kNarrowEpsilon);
}

}  // namespace

LatentAttentionImpl::LatentAttentionImpl(const ModelOptions& options, Initializer& initializer)
    : options_(options),
      scale_(latent_softmax_scale(options) /
             std::sqrt(static_cast<double>(options.head_width() + options.rope_size))) {
  const int64_t hidden = options.hidden, heads = options.heads, width = options.head_width();
  const auto matrix = [&](const char* name, int64_t rows, int64_t columns) {
    const double deviation = 1 / std::sqrt(static_cast<double>(columns));
    return register_parameter(name, initializer.normal({rows, columns}, deviation));
  };
  const int64_t queries = heads * (width + options.rope_size);
  if (options.query_rank > 0) {
    query_down_ = matrix("query_down", options.query_rank, hidden);
    query_norm_ = register_parameter("query_norm", initializer.ones({options.query_rank}));
  }
  query_weight_ = matrix("query", queries, options.query_rank > 0 ? options.query_rank : hidden);
  kv_down_ = matrix("kv_down", options.kv_rank + options.rope_size, hidden);
  kv_norm_ = register_parameter("kv_norm", initializer.ones({options.kv_rank}));
  kv_up_ = matrix("kv_up", heads * (width + options.value_width()), options.kv_rank);
  const int64_t values = heads * options.value_width();
  output_weight_ = register_parameter(
      "output", initializer.normal({hidden, values}, output_deviation(values, options)));
}

torch::Tensor LatentAttentionImpl::queries_of(const torch::Tensor& x) const {
  const auto from =
      query_down_.defined() ? narrow_norm(at::linear(x, query_down_), query_norm_) : x;
  return at::linear(from, query_weight_).unflatten(-1, {options_.heads, -1});
}

torch::Tensor LatentAttentionImpl::latent_of(const torch::Tensor& x,
                                             const torch::Tensor& rotation) const {
  const auto down = at::linear(x, kv_down_).unsqueeze(2);
  const auto latent = narrow_norm(down.narrow(-1, 0, options_.kv_rank), kv_norm_);
  const auto rotated = rotate(down.narrow(-1, options_.kv_rank, options_.rope_size), rotation);
  return at::cat({latent, rotated}, -1);
}

torch::Tensor LatentAttentionImpl::attend_expanded(const torch::Tensor& plain,
                                                   const torch::Tensor& rotated,
                                                   const torch::Tensor& latent) const {
  const int64_t heads = options_.heads, width = options_.head_width();
  const auto narrow = latent.narrow(-1, 0, options_.kv_rank).squeeze(2);
  const auto up = at::linear(narrow, kv_up_).unflatten(-1, {heads, -1});
  const auto shared = latent.narrow(-1, options_.kv_rank, options_.rope_size);
  const auto key = at::cat({up.narrow(-1, 0, width), shared.expand({-1, -1, heads, -1})}, -1);
  return attend(at::cat({plain, rotated}, -1), key, up.narrow(-1, width, options_.value_width()),
                scale_);
}

/// The same sums in another order: a query goes down to the latents' width, and their mean up, so that no
/// key or value of the tokens before is made. That is less work for a query of one token alone.
torch::Tensor LatentAttentionImpl::attend_absorbed(const torch::Tensor& plain,
                                                   const torch::Tensor& rotated,
                                                   const torch::Tensor& latent) const {
  const auto up = kv_up_.view({options_.heads, -1, options_.kv_rank});
  const auto up_keys = up.narrow(1, 0, options_.head_width());
  const auto up_values = up.narrow(1, options_.head_width(), options_.value_width());
  const auto query = at::cat({at::einsum("bshd,hdr->bshr", {plain, up_keys}), rotated}, -1);
  const auto mean = attend(query, latent, latent.narrow(-1, 0, options_.kv_rank), scale_);
  return at::einsum("bshr,hvr->bshv", {mean, up_values});
}

torch::Tensor LatentAttentionImpl::forward(const torch::Tensor& x, const torch::Tensor& rotation,
                                           AttentionCache* cache) {
  const auto queries = queries_of(x);
  const auto plain = queries.narrow(-1, 0, options_.head_width());
  const auto rotated =
      rotate(queries.narrow(-1, options_.head_width(), options_.rope_size), rotation);
  auto latent = latent_of(x, rotation);
  const bool has_past = cache != nullptr && cache->key.defined();
  if (has_past) {
    latent = at::cat({cache->key, latent}, 1);
  }
  if (cache != nullptr) {
    cache->key = latent;
  }
  const auto mixed =
      has_past ? attend_absorbed(plain, rotated, latent) : attend_expanded(plain, rotated, latent);
  return at::linear(mixed.flatten(2), output_weight_);
}

}  // namespace train_lm
