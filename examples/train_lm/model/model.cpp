#include "model/model.h"

#include <ATen/ATen.h>

#include <utility>

#include "model/recompute.h"

namespace train_lm {
namespace {

anabranch::MoEOptions moe_options_of(const Options& options, int64_t layer) {
  const ModelOptions& model = options.model;
  anabranch::MoEOptions moe;
  moe.hidden_size = model.hidden;
  moe.expert_hidden_size = model.expert_hidden;
  moe.num_experts = model.experts;
  moe.top_k = model.top_k;
  moe.renormalize = model.renormalize == "auto" ? model.top_k > 1 : model.renormalize == "yes";
  moe.router_score = model.router_score == "sigmoid" ? anabranch::RouterScore::kSigmoid
                                                     : anabranch::RouterScore::kSoftmax;
  moe.routing_scale = model.routing_scale;
  moe.expert_bias = model.bias_rate > 0;
  moe.glu = model.glu;
  moe.activation = model.glu ? anabranch::Activation::kSilu : anabranch::Activation::kGeluTanh;
  moe.bias = model.expert_biases;
  moe.shared_expert_hidden_size = model.shared_expert_hidden;
  moe.recompute = options.recompute == "experts";
  moe.dtype = model.parameter_type();
  moe.device = torch::Device(options.device);
  moe.seed = mixed_seed(options.training.seed, Stream::kExperts, static_cast<uint64_t>(layer));
  return moe;
}

void add_to(torch::Tensor& sum, const torch::Tensor& value) {
  sum = sum.defined() ? sum + value : value;
}

}  // namespace

BlockImpl::BlockImpl(const ModelOptions& options, const anabranch::MoEOptions* moe_options,
                     std::shared_ptr<anabranch::Communicator> expert_parallel,
                     Initializer& initializer)
    : options_(options) {
  attention_ = register_module("attention", Attention(options, initializer));
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
  const auto attended =
      timeline.mark(x + attention_(normalize(x, attention_norm_, options_), rotation, cache),
                    "attention", "experts, backward");
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

LanguageModelImpl::LanguageModelImpl(
    const Options& options, const std::shared_ptr<anabranch::Communicator>& expert_parallel)
    : options_(options.model), recompute_blocks_(options.recompute == "block") {
  const int64_t hidden = options_.hidden, vocabulary = options_.vocabulary;
  Initializer initializer(
      options.training.seed,
      torch::TensorOptions(options_.parameter_type()).device(torch::Device(options.device)));
  const double deviation = options_.tied_head ? 0.02 : 0.5;
  embedding_ = register_parameter("embedding", initializer.normal({vocabulary, hidden}, deviation));
  for (int64_t layer = 0; layer < options_.layers; ++layer) {
    const auto moe = moe_options_of(options, layer);
    Block block(options_, layer < options_.dense_layers ? nullptr : &moe, expert_parallel,
                initializer);
    blocks_.push_back(register_module("block" + std::to_string(layer), block));
  }
  norm_ = register_parameter("norm", initializer.ones({hidden}));
  if (!options_.tied_head) {
    head_ = register_parameter("head", initializer.normal({vocabulary, hidden}, 0.02));
  }
}

anabranch::MoEOutput LanguageModelImpl::through_block(Block& block, const torch::Tensor& x,
                                                      const torch::Tensor& rotation,
                                                      AttentionCache* cache) {
  if (!recompute_blocks_ || !at::GradMode::is_enabled()) {
    return block(x, rotation, timeline_, cache);
  }
  const auto outputs = recomputed(x, [this, block, rotation](const torch::Tensor& input) mutable {
    const auto result = block->forward(input, rotation, timeline_);
    std::vector<torch::Tensor> tensors{result.output};
    if (result.balance_loss.defined()) {
      tensors.insert(tensors.end(), {result.balance_loss, result.z_loss, result.expert_load});
    }
    return tensors;
  });
  anabranch::MoEOutput result;
  result.output = outputs[0];
  if (outputs.size() > 1) {
    result.balance_loss = outputs[1];
    result.z_loss = outputs[2];
    result.expert_load = outputs[3];
  }
  return result;
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
    auto& block = blocks_[layer];
    const auto output =
        through_block(block, x, rotation, caches == nullptr ? nullptr : &(*caches)[layer]);
    const bool is_last = block.get() == blocks_.back().get();
    x = timeline_.mark(output.output, "experts",
                       is_last ? "head, backward" : "attention, backward");
    if (output.balance_loss.defined()) {
      add_to(result.balance_loss, output.balance_loss);
      add_to(result.z_loss, output.z_loss);
      result.expert_load.push_back(output.expert_load);
    }
  }
  result.hidden = normalize(x, norm_, options_);
  return result;
}

void LanguageModelImpl::update_expert_biases(const torch::Tensor& expert_load) {
  if (options_.bias_rate == 0) {
    return;
  }
  int64_t layer = 0;
  for (auto& block : blocks_) {
    if (!block->moe().is_empty()) {
      block->moe()->update_expert_bias(expert_load[layer++], options_.bias_rate);
    }
  }
}

}  // namespace train_lm
