#pragma once

#include <torch/types.h>

#include "model/model_options.h"

namespace train_lm {

// What a GPU does in one pass over bf16 tensors, where LibTorch's operations would make several. The
// callers have the same in LibTorch's operations for everything else.

/// Whether these kernels take such tensors.
inline bool has_kernels_for(const torch::Tensor& tensor) {
  return tensor.is_cuda() && tensor.scalar_type() == at::kBFloat16;
}

/// How queries and keys are made of a projection's output; weights undefined: no RMSNorm.
struct HeadsOptions {
  int64_t heads;
  int64_t key_heads;
  int64_t width;  ///< of a head: 64, 128 or 256
  bool norm_of_all = false;
  double epsilon = 0;
};

struct Heads {
  torch::Tensor query;  ///< [B, S, heads, D]
  torch::Tensor key;    ///< [B, S, key_heads, D]
};
/// Of `qkv` [B, S, heads + 2 key_heads, D], with `rotation` [S, 1, D / 2] complex of fp32.
Heads heads_of(const torch::Tensor& qkv, const torch::Tensor& query_norm,
               const torch::Tensor& key_norm, const torch::Tensor& rotation,
               const HeadsOptions& options);

struct HeadsGradient {
  torch::Tensor qkv;         ///< as qkv
  torch::Tensor query_norm;  ///< fp32; undefined without one
  torch::Tensor key_norm;
};
/// Given the gradients of both, and of the values `dvalue` [B, S, key_heads, D], which are a part of qkv.
HeadsGradient heads_backward(const torch::Tensor& dquery, const torch::Tensor& dkey,
                             const torch::Tensor& dvalue, const torch::Tensor& qkv,
                             const torch::Tensor& query_norm, const torch::Tensor& key_norm,
                             const torch::Tensor& rotation, const HeadsOptions& options);

/// [T] fp32: −ln p(target) of `logits` [T, V], which with `with_gradient` become the gradient of `scale`
/// times their sum.
torch::Tensor cross_entropy_of_rows(torch::Tensor& logits, const torch::Tensor& targets,
                                    double scale, bool with_gradient);

}  // namespace train_lm
