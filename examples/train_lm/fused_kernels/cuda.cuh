#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

// Launchers of kernels.cu: raw device pointers, no LibTorch. 16-bit tensors are bf16.

namespace train_lm::cuda {

enum class HeadNorm { kNone, kEach, kAll };

struct HeadsShape {
  int64_t tokens;
  int64_t length;  ///< of a sequence: a token's position is its number modulo this
  int heads;
  int key_heads;
  int width;
  HeadNorm norm;
  float epsilon;
};

/// `rotation`: cosine and sine, [length, width / 2, 2] fp32. Norms: [width] or [heads · width] bf16, or null.
void launch_heads(const HeadsShape& shape, const void* qkv, const void* query_norm,
                  const void* key_norm, const float* rotation, void* query, void* key,
                  cudaStream_t stream);

/// Blocks of the backward's grid.
int64_t heads_blocks(const HeadsShape& shape);

/// `dnorm` [heads_blocks, (heads + key_heads) · width] fp32, or null without norms: parts of the sum of the
/// norms' gradients, for each head.
void launch_heads_backward(const HeadsShape& shape, const void* dquery, const void* dkey,
                           const void* dvalue, const void* qkv, const void* query_norm,
                           const void* key_norm, const float* rotation, void* dqkv, float* dnorm,
                           cudaStream_t stream);

void launch_cross_entropy(int64_t tokens, int64_t vocabulary, void* logits, const int64_t* targets,
                          float scale, bool with_gradient, float* losses, cudaStream_t stream);

}  // namespace train_lm::cuda
