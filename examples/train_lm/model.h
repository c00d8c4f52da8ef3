#pragma once

#include <anabranch/moe_layer.h>
#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include <memory>
#include <string>
#include <vector>

#include "options.h"

namespace train_lm {

constexpr int64_t kVocabulary = 256;  // bytes

/// Causal self-attention with rotary positions.
class AttentionImpl : public torch::nn::Module {
 public:
  AttentionImpl(const ModelOptions& options, class Initializer& initializer);

  /// `x`: [B, S, h], `rotation`: [S, 1, 1, h / heads / 2] complex → [B, S, h].
  torch::Tensor forward(const torch::Tensor& x, const torch::Tensor& rotation);

 private:
  int64_t heads_;
  torch::Tensor qkv_weight_;     // [3 h, h]
  torch::Tensor output_weight_;  // [h, h]
};
TORCH_MODULE(Attention);

/// x + attention(norm(x)), then x + MoE(norm(x)).
class BlockImpl : public torch::nn::Module {
 public:
  BlockImpl(const ModelOptions& options, const anabranch::MoEOptions& moe_options,
            std::shared_ptr<anabranch::Communicator> expert_parallel, Initializer& initializer);

  anabranch::MoEOutput forward(const torch::Tensor& x, const torch::Tensor& rotation);

 private:
  Attention attention_{nullptr};
  anabranch::MoELayer moe_{nullptr};
  torch::Tensor attention_norm_;  // [h]
  torch::Tensor moe_norm_;        // [h]
};
TORCH_MODULE(Block);

struct ModelOutput {
  torch::Tensor logits;                    ///< [B, S, kVocabulary]
  torch::Tensor balance_loss;              ///< [] summed over layers
  torch::Tensor z_loss;                    ///< [] summed over layers
  std::vector<torch::Tensor> expert_load;  ///< per layer [experts], over all ranks
};

/// A decoder-only transformer whose every feed-forward layer is a Mixture of Experts. Replicated
/// parameters are the same on every rank, and all of them at any number of ranks: each is drawn by
/// its own generator.
class LanguageModelImpl : public torch::nn::Module {
 public:
  LanguageModelImpl(const Options& options,
                    const std::shared_ptr<anabranch::Communicator>& expert_parallel);

  /// `tokens`: [B, S] int64; B and S may differ between ranks, and B be 0. Collective.
  ModelOutput forward(const torch::Tensor& tokens);

 private:
  int64_t head_size_;
  torch::Tensor embedding_;  // [kVocabulary, h]
  std::vector<Block> blocks_;
  torch::Tensor norm_;  // [h]
  torch::Tensor head_;  // [kVocabulary, h]
};
TORCH_MODULE(LanguageModel);

}  // namespace train_lm
