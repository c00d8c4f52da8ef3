#pragma once

#include <anabranch/moe_layer.h>
#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include <memory>
#include <string>
#include <vector>

#include "model/attention.h"
#include "model/feed_forward.h"
#include "model/latent_attention.h"
#include "options.h"
#include "metrics/timeline.h"

namespace train_lm {

/// x + attention(norm(x)), then x + MoE(norm(x)), or in the first layers x + feed_forward(norm(x)).
class BlockImpl : public torch::nn::Module {
 public:
  /// `moe_options`: null for a layer without experts.
  BlockImpl(const ModelOptions& options, const anabranch::MoEOptions* moe_options,
            std::shared_ptr<anabranch::Communicator> expert_parallel, Initializer& initializer);

  /// Without experts the losses and the load are undefined.
  anabranch::MoEOutput forward(const torch::Tensor& x, const torch::Tensor& rotation,
                               Timeline& timeline, AttentionCache* cache = nullptr);

  /// Empty without experts.
  anabranch::MoELayer& moe() { return moe_; }

 private:
  ModelOptions options_;
  Attention attention_{nullptr};  // or
  LatentAttention latent_attention_{nullptr};
  anabranch::MoELayer moe_{nullptr};
  FeedForward feed_forward_{nullptr};
  torch::Tensor attention_norm_;  // [h]
  torch::Tensor moe_norm_;        // [h]
};
TORCH_MODULE(Block);

/// Of a layer without experts all but the output are undefined.
struct BlockOutput {
  torch::Tensor output;        ///< [B, S, h]
  torch::Tensor balance_loss;  ///< []
  torch::Tensor z_loss;        ///< []
  torch::Tensor expert_load;   ///< [experts]
  torch::Tensor
      further_losses;  ///< [] the others that have a coefficient, times it; may be undefined

  /// Those that are defined, in their order.
  std::vector<torch::Tensor> tensors() const;
  static BlockOutput of(const std::vector<torch::Tensor>& tensors);
};

struct ModelOutput {
  torch::Tensor hidden;        ///< [B, S, h], which the head is to be multiplied by
  torch::Tensor balance_loss;  ///< [] summed over layers with experts
  torch::Tensor z_loss;        ///< [] summed over layers with experts
  torch::Tensor
      further_losses;  ///< [] the others that have a coefficient, times it; may be undefined
  std::vector<torch::Tensor> expert_load;  ///< of each of them [experts], over all ranks
};

/// A decoder-only transformer whose feed-forward layers are Mixtures of Experts. Replicated
/// parameters are the same on every rank, and all of them at any number of ranks: each is drawn by
/// its own generator.
class LanguageModelImpl : public torch::nn::Module {
 public:
  LanguageModelImpl(const Options& options,
                    const std::shared_ptr<anabranch::Communicator>& expert_parallel);

  /// `tokens`: [B, S] int64; B and S may differ between ranks, and B be 0. `caches`, of each layer: see
  /// Attention; without gradients. Collective.
  ModelOutput forward(const torch::Tensor& tokens, std::vector<AttentionCache>* caches = nullptr);

  /// [vocabulary, h]: logits are hidden · headᵀ.
  const torch::Tensor& head() const { return head_.defined() ? head_ : embedding_; }
  /// What layers keep of a step's forwards begins anew; `replicas`: the ranks with copies of this rank's experts.
  void begin_step(const std::shared_ptr<anabranch::Communicator>& replicas);
  /// Of each layer with experts the load of a step, [layers, experts] on its device, over all ranks:
  /// moves their selection biases. Collective.
  void update_expert_biases(const torch::Tensor& expert_load, anabranch::Communicator& world);
  /// What routers draw in the forwards that follow depends on this and their layer alone.
  void seed_routers(uint64_t seed) { routing_seed_ = seed; }
  /// Of the layers with experts, in their order.
  std::vector<anabranch::MoELayer> moe_layers();
  /// Where the time of a step goes.
  Timeline& timeline() { return timeline_; }

 private:
  BlockOutput through_block(size_t layer, const torch::Tensor& x, const torch::Tensor& rotation,
                            AttentionCache* cache);
  void seed_router(uint64_t seed) const;

  ModelOptions options_;
  TrainingOptions training_;
  bool recompute_blocks_;
  bool routers_draw_;
  torch::Device device_;
  uint64_t routing_seed_ = 0;
  Timeline timeline_;
  torch::Tensor embedding_;  // [vocabulary, h]
  std::vector<Block> blocks_;
  torch::Tensor norm_;  // [h]
  torch::Tensor head_;  // [vocabulary, h]; undefined where it is the embedding
};
TORCH_MODULE(LanguageModel);

}  // namespace train_lm
