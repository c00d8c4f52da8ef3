#include "model/model.h"

#include <ATen/ATen.h>

#include <mutex>
#include <utility>

#include "data/random.h"
#include "model/layer_options.h"
#include "model/recompute.h"

namespace train_lm {
namespace {

void add_to(torch::Tensor& sum, const torch::Tensor& value) {
  sum = sum.defined() ? sum + value : value;
}

/// What only some routers have, times its coefficient; undefined where nothing of it is wanted.
torch::Tensor further_losses(const anabranch::MoEOutput& output, const TrainingOptions& training) {
  torch::Tensor sum;
  for (const auto& [loss, coefficient] :
       {std::pair{output.importance_loss, training.importance_loss},
        std::pair{output.load_loss, training.load_loss},
        std::pair{output.sequence_balance_loss, training.sequence_balance_loss},
        std::pair{output.global_balance_loss, training.global_balance_loss}}) {
    if (loss.defined() && coefficient > 0) add_to(sum, loss * coefficient);
  }
  return sum;
}

}  // namespace

BlockImpl::BlockImpl(const ModelOptions& options, const anabranch::MoEOptions* moe_options,
                     std::shared_ptr<anabranch::Communicator> expert_parallel,
                     Initializer& initializer)
    : options_(options) {
  if (options.kv_rank > 0) {
    latent_attention_ = register_module("attention", LatentAttention(options, initializer));
  } else {
    attention_ = register_module("attention", Attention(options, initializer));
  }
  if (moe_options != nullptr) {
    moe_ = register_module("moe", anabranch::MoELayer(*moe_options, std::move(expert_parallel)));
  } else {
    feed_forward_ = register_module("feed_forward", FeedForward(options, initializer));
  }
  attention_norm_ = register_parameter("attention_norm", initializer.ones({options.hidden}));
  moe_norm_ = register_parameter("moe_norm", initializer.ones({options.hidden}));
}

anabranch::MoEOutput BlockImpl::forward(const torch::Tensor& x, const torch::Tensor& rotation,
                                        Timeline& timeline, AttentionCache* cache) {
  const auto normed = normalize(x, attention_norm_, options_);
  const auto mixed = attention_.is_empty() ? latent_attention_(normed, rotation, cache)
                                           : attention_(normed, rotation, cache);
  const auto attended = timeline.mark(x + mixed, "attention", "experts, backward");
  const auto normal = normalize(attended, moe_norm_, options_);
  anabranch::MoEOutput result;
  if (moe_.is_empty()) {
    result.output = feed_forward_(normal);
  } else {
    result = moe_->forward(normal);
  }
  result.output = attended + result.output;
  return result;
}

std::vector<torch::Tensor> BlockOutput::tensors() const {
  std::vector<torch::Tensor> defined;
  for (const auto& tensor : {output, balance_loss, z_loss, expert_load, further_losses}) {
    if (tensor.defined()) defined.push_back(tensor);
  }
  return defined;
}

BlockOutput BlockOutput::of(const std::vector<torch::Tensor>& tensors) {
  auto all = tensors;
  all.resize(5);
  return {all[0], all[1], all[2], all[3], all[4]};
}

LanguageModelImpl::LanguageModelImpl(
    const Options& options, const std::shared_ptr<anabranch::Communicator>& expert_parallel)
    : options_(options.model),
      training_(options.training),
      recompute_blocks_(options.recompute == "block"),
      routers_draw_(routers_draw(options)),
      device_(options.device) {
  const int64_t hidden = options_.hidden, vocabulary = options_.vocabulary;
  Initializer initializer(
      options.training.seed,
      torch::TensorOptions(options_.parameter_type()).device(torch::Device(options.device)));
  const double deviation = options_.tied_head ? 0.02 : 0.5;
  embedding_ = register_parameter("embedding", initializer.normal({vocabulary, hidden}, deviation));
  for (int64_t layer = 0; layer < options_.layers; ++layer) {
    const auto moe = layer_options(options, layer);
    Block block(options_, layer < options_.dense_layers ? nullptr : &moe, expert_parallel,
                initializer);
    blocks_.push_back(register_module("block" + std::to_string(layer), block));
  }
  norm_ = register_parameter("norm", initializer.ones({hidden}));
  if (!options_.tied_head) {
    head_ = register_parameter("head", initializer.normal({vocabulary, hidden}, 0.02));
  }
}

void LanguageModelImpl::seed_router(uint64_t seed) const {
  if (!routers_draw_) return;
  auto generator = at::globalContext().defaultGenerator(device_);
  const std::lock_guard lock(generator.mutex());
  generator.set_current_seed(seed);
}

BlockOutput LanguageModelImpl::through_block(size_t layer, const torch::Tensor& x,
                                             const torch::Tensor& rotation, AttentionCache* cache) {
  auto block = blocks_[layer];
  const uint64_t seed = mixed_seed(routing_seed_, Stream::kRouting, layer);
  auto run = [this, block, rotation, seed](const torch::Tensor& input,
                                           AttentionCache* past) mutable {
    seed_router(seed);
    const auto result = block->forward(input, rotation, timeline_, past);
    return BlockOutput{result.output, result.balance_loss, result.z_loss, result.expert_load,
                       further_losses(result, training_)};
  };
  if (!recompute_blocks_ || !at::GradMode::is_enabled()) {
    return run(x, cache);
  }
  return BlockOutput::of(recomputed(
      x, [run](const torch::Tensor& input) mutable { return run(input, nullptr).tensors(); }));
}

ModelOutput LanguageModelImpl::forward(const torch::Tensor& tokens,
                                       std::vector<AttentionCache>* caches) {
  torch::Tensor x =
      timeline_.mark(at::embedding(embedding_, tokens), "embedding", "attention, backward");
  const bool has_past = caches != nullptr && caches->front().key.defined();
  const int64_t past = has_past ? caches->front().key.size(1) : 0;
  const auto rotation = rotation_of(past, tokens.size(1), options_, tokens.device());
  ModelOutput result;
  for (size_t layer = 0; layer < blocks_.size(); ++layer) {
    const auto output =
        through_block(layer, x, rotation, caches == nullptr ? nullptr : &(*caches)[layer]);
    const bool is_last = layer + 1 == blocks_.size();
    x = timeline_.mark(output.output, "experts",
                       is_last ? "head, backward" : "attention, backward");
    if (output.balance_loss.defined()) {
      add_to(result.balance_loss, output.balance_loss);
      add_to(result.z_loss, output.z_loss);
      result.expert_load.push_back(output.expert_load);
    }
    if (output.further_losses.defined()) add_to(result.further_losses, output.further_losses);
  }
  result.hidden = normalize(x, norm_, options_);
  return result;
}

void LanguageModelImpl::begin_step(const std::shared_ptr<anabranch::Communicator>& replicas) {
  for (auto& moe : moe_layers()) {
    moe->set_expert_replicas(replicas);
    moe->begin_step();
  }
}

void LanguageModelImpl::update_expert_biases(const torch::Tensor& expert_load,
                                             anabranch::Communicator& world) {
  if (options_.bias_rate == 0) {
    return;
  }
  int64_t layer = 0;
  for (auto& moe : moe_layers()) {
    if (options_.bias_update == "quantile") {
      moe->update_expert_bias(world, options_.bias_rate);
    } else {
      moe->update_expert_bias(expert_load[layer++], options_.bias_rate);
    }
  }
}

std::vector<anabranch::MoELayer> LanguageModelImpl::moe_layers() {
  std::vector<anabranch::MoELayer> layers;
  for (auto& block : blocks_) {
    if (!block->moe().is_empty()) layers.push_back(block->moe());
  }
  return layers;
}

}  // namespace train_lm
