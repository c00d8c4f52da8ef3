#include "model/attention.h"

#include <ATen/ATen.h>

#include <cmath>

namespace train_lm {
torch::Tensor normalize(const torch::Tensor& x, const torch::Tensor& weight,
                        const ModelOptions& model) {
  return model.norm == "rms" ? at::rms_norm(x, weight.sizes(), weight, model.norm_epsilon)
                             : at::layer_norm(x, weight.sizes(), weight, {}, model.norm_epsilon);
}

torch::Tensor attend(const torch::Tensor& query, const torch::Tensor& key,
                     const torch::Tensor& value, double scale) {
  const bool grouped = query.size(2) != key.size(2);
  return at::scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2),
                                          value.transpose(1, 2), /*attn_mask=*/{},
                                          /*dropout_p=*/0.0,
                                          /*is_causal=*/query.size(1) == key.size(1), scale,
                                          /*enable_gqa=*/grouped)
      .transpose(1, 2);
}

AttentionImpl::AttentionImpl(const ModelOptions& options, Initializer& initializer)
    : options_(options) {
  const int64_t hidden = options.hidden, width = options.head_width();
  const int64_t queries = options.heads * width, keys = options.key_heads() * width;
  const double deviation = 1 / std::sqrt(static_cast<double>(hidden));
  qkv_weight_ =
      register_parameter("qkv", initializer.normal({queries + 2 * keys, hidden}, deviation));
  output_weight_ = register_parameter(
      "output", initializer.normal({hidden, queries}, output_deviation(queries, options)));
  if (options.attention_bias) {
    qkv_bias_ = register_parameter("qkv_bias", initializer.zeros({queries + 2 * keys}));
    output_bias_ = register_parameter("output_bias", initializer.zeros({hidden}));
  }
  if (options.qk_norm != "none") {
    const bool of_each = options.qk_norm == "head";
    query_norm_ = register_parameter("query_norm", initializer.ones({of_each ? width : queries}));
    key_norm_ = register_parameter("key_norm", initializer.ones({of_each ? width : keys}));
  }
}

torch::Tensor AttentionImpl::forward(const torch::Tensor& x, const torch::Tensor& rotation,
                                     AttentionCache* cache) {
  auto [query, key, value] = attention_heads(at::linear(x, qkv_weight_, qkv_bias_), query_norm_,
                                             key_norm_, rotation, options_);
  if (cache != nullptr) {
    if (cache->key.defined()) {
      key = at::cat({cache->key, key}, 1);
      value = at::cat({cache->value, value}, 1);
    }
    *cache = {key, value};
  }
  const double scale = 1 / std::sqrt(static_cast<double>(options_.head_width()));
  return at::linear(attend(query, key, value, scale).flatten(2), output_weight_, output_bias_);
}

}  // namespace train_lm
