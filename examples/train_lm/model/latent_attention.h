#pragma once

#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include "model/attention.h"
#include "model/initializer.h"
#include "model/model_options.h"

namespace train_lm {

/// Causal self-attention whose keys and values are made of one narrow vector a token (MLA, DeepSeek-V2,
/// arXiv:2405.04434); queries may be, too. A head has D numbers without a position, and R that are rotated and,
/// of keys, shared by all heads; its values have V.
class LatentAttentionImpl : public torch::nn::Module {
 public:
  LatentAttentionImpl(const ModelOptions& options, Initializer& initializer);

  /// As Attention's. The cache has of a token the narrow vector and the rotated part of keys alone: its `key` is
  /// [B, S, 1, kv_rank + R], its `value` undefined.
  torch::Tensor forward(const torch::Tensor& x, const torch::Tensor& rotation,
                        AttentionCache* cache = nullptr);

 private:
  torch::Tensor queries_of(const torch::Tensor& x) const;
  /// [B, S, 1, kv_rank + R]: what all keys and values are made of.
  torch::Tensor latent_of(const torch::Tensor& x, const torch::Tensor& rotation) const;
  /// Of queries, [B, S, heads, D] without a position and [B, S, heads, R] with one, to latents: [B, S, heads, V].
  torch::Tensor attend_expanded(const torch::Tensor& plain, const torch::Tensor& rotated,
                                const torch::Tensor& latent) const;
  torch::Tensor attend_absorbed(const torch::Tensor& plain, const torch::Tensor& rotated,
                                const torch::Tensor& latent) const;

  ModelOptions options_;
  double scale_;
  torch::Tensor query_weight_;   // [heads (D + R), h], or of the narrow vector, [.., query_rank]
  torch::Tensor query_down_;     // [query_rank, h] or undefined
  torch::Tensor query_norm_;     // [query_rank] or undefined
  torch::Tensor kv_down_;        // [kv_rank + R, h]: the narrow vector, the rotated part of keys
  torch::Tensor kv_norm_;        // [kv_rank]
  torch::Tensor kv_up_;          // [heads (D + V), kv_rank]: of each head its keys and values
  torch::Tensor output_weight_;  // [h, heads V]
};
TORCH_MODULE(LatentAttention);

}  // namespace train_lm
