#pragma once

#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include "model/heads.h"
#include "model/initializer.h"
#include "model/model_options.h"

namespace train_lm {

/// LayerNorm without a bias, or RMSNorm, over the last dimension.
torch::Tensor normalize(const torch::Tensor& x, const torch::Tensor& weight,
                        const ModelOptions& model);

/// Keys and values of the tokens so far, or what they are made of.
struct AttentionCache {
  torch::Tensor key;    ///< [B, S, key_heads, D]; undefined: of none
  torch::Tensor value;  ///< [B, S, key_heads, V]; undefined where it is a part of `key`
};

/// The mean of the values [B, S, key_heads, V], weighed by the softmax of `scale` · query · key: [B, T, heads, V]. Of
/// as many tokens each sees those up to itself, a single one sees all. Heads of queries share those of keys in order.
torch::Tensor attend(const torch::Tensor& query, const torch::Tensor& key,
                     const torch::Tensor& value, double scale);

/// Causal self-attention with rotary positions, in heads that may share keys and values.
class AttentionImpl : public torch::nn::Module {
 public:
  AttentionImpl(const ModelOptions& options, Initializer& initializer);

  /// `x`: [B, S, h] → [B, S, h]. With a cache they stand behind the tokens that it has, of which there are
  /// none or `x` is one token, and are added to it.
  torch::Tensor forward(const torch::Tensor& x, const torch::Tensor& rotation,
                        AttentionCache* cache = nullptr);

 private:
  ModelOptions options_;
  torch::Tensor qkv_weight_;     // [(heads + 2 key_heads) D, h]: queries, keys, values
  torch::Tensor qkv_bias_;       // [.] or undefined
  torch::Tensor output_weight_;  // [h, heads D]
  torch::Tensor output_bias_;    // [h] or undefined
  torch::Tensor query_norm_;     // [D], or [heads D], or undefined
  torch::Tensor key_norm_;       // [D], or [key_heads D], or undefined
};
TORCH_MODULE(Attention);

}  // namespace train_lm
