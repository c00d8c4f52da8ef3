#pragma once

#include <torch/types.h>

#include "model/model_options.h"

namespace train_lm {

/// rotation_scale · exp(i · position · frequency) for `length` positions from `first` on: [S, 1, rotated_width / 2] complex, of
/// fp64 for a model of fp64 and of fp32 for any other.
torch::Tensor rotation_of(int64_t first, int64_t length, const ModelOptions& model,
                          torch::Device device);

/// Of `heads` [B, S, heads, D], in fp32 at least: pairs of neighbours are complex numbers that are multiplied
/// by `rotation`.
torch::Tensor rotate(const torch::Tensor& heads, const torch::Tensor& rotation);

struct AttentionHeads {
  torch::Tensor query;  ///< [B, S, heads, D]
  torch::Tensor key;    ///< [B, S, key_heads, D]
  torch::Tensor value;  ///< [B, S, key_heads, D], a part of what they are made of
};

/// Of `qkv` [B, S, (heads + 2 key_heads) D]: queries and keys with their RMSNorm, whose weights may be
/// undefined, turned by their positions.
AttentionHeads attention_heads(const torch::Tensor& qkv, const torch::Tensor& query_norm,
                               const torch::Tensor& key_norm, const torch::Tensor& rotation,
                               const ModelOptions& model);

}  // namespace train_lm
