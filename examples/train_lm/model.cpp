#include "model.h"

#include <ATen/ATen.h>

#include <cmath>
#include <utility>

#include "random.h"

namespace train_lm {

/// Draws parameters one after another, each from its own generator.
class Initializer {
 public:
  Initializer(uint64_t seed, torch::TensorOptions options) : seed_(seed), options_(options) {}

  /// Normal with this standard deviation; drawn in fp32 whatever the parameters' type.
  torch::Tensor normal(at::IntArrayRef sizes, double deviation) {
    const auto generator = make_generator(seed_, Stream::kParameter, drawn_++);
    return (at::randn(sizes, generator, at::kFloat) * deviation).to(options_);
  }
  torch::Tensor ones(at::IntArrayRef sizes) const { return at::ones(sizes, options_); }

 private:
  uint64_t seed_;
  uint64_t drawn_ = 0;
  torch::TensorOptions options_;
};

namespace {

torch::Dtype dtype_of(const ModelOptions& options) {
  return options.dtype == "float64" ? at::kDouble : at::kFloat;
}

anabranch::MoEOptions moe_options_of(const Options& options, int64_t layer) {
  const ModelOptions& model = options.model;
  anabranch::MoEOptions moe;
  moe.hidden_size = model.hidden;
  moe.expert_hidden_size = model.expert_hidden;
  moe.num_experts = model.experts;
  moe.top_k = model.top_k;
  // Of a single expert the weight itself, which trains the router.
  moe.renormalize = model.top_k > 1;
  moe.glu = model.glu;
  moe.activation = model.glu ? anabranch::Activation::kSilu : anabranch::Activation::kGeluTanh;
  moe.recompute = options.recompute;
  moe.dtype = dtype_of(model);
  moe.device = torch::Device(options.device);
  moe.seed = mixed_seed(options.training.seed, Stream::kExperts, static_cast<uint64_t>(layer));
  return moe;
}

torch::Tensor normalize(const torch::Tensor& x, const torch::Tensor& weight) {
  return at::layer_norm(x, weight.sizes(), weight);
}

/// exp(i · position · frequency): [S, 1, 1, head_size / 2] complex.
torch::Tensor rotation_of(int64_t sequence_length, int64_t head_size,
                          const torch::TensorOptions& options) {
  const auto positions = at::arange(sequence_length, options);
  const auto frequencies =
      at::pow(1e4, at::arange(head_size / 2, options) * (-2.0 / static_cast<double>(head_size)));
  const auto angles = at::outer(positions, frequencies);
  return at::polar(at::ones_like(angles), angles).view({sequence_length, 1, 1, head_size / 2});
}

}  // namespace

AttentionImpl::AttentionImpl(const ModelOptions& options, Initializer& initializer)
    : heads_(options.heads) {
  const int64_t hidden = options.hidden;
  const double deviation = 1 / std::sqrt(static_cast<double>(hidden));
  qkv_weight_ = register_parameter("qkv", initializer.normal({3 * hidden, hidden}, deviation));
  // So that the residual stream's size does not grow with the number of layers.
  const double output_deviation = deviation / std::sqrt(2.0 * static_cast<double>(options.layers));
  output_weight_ =
      register_parameter("output", initializer.normal({hidden, hidden}, output_deviation));
}

torch::Tensor AttentionImpl::forward(const torch::Tensor& x, const torch::Tensor& rotation) {
  const int64_t batch = x.size(0), length = x.size(1), head_size = x.size(2) / heads_;
  const auto qkv = at::linear(x, qkv_weight_);
  // Queries and keys turn together, as pairs that are complex numbers.
  const auto pairs =
      qkv.narrow(2, 0, 2 * x.size(2)).view({batch, length, 2, heads_, head_size / 2, 2});
  const auto turned = at::view_as_real(at::view_as_complex(pairs) * rotation)
                          .view({batch, length, 2, heads_, head_size});
  const auto query = turned.select(2, 0).transpose(1, 2);  // [B, heads, S, head_size]
  const auto key = turned.select(2, 1).transpose(1, 2);
  const auto value = qkv.narrow(2, 2 * x.size(2), x.size(2))
                         .view({batch, length, heads_, head_size})
                         .transpose(1, 2);
  const auto mixed = at::scaled_dot_product_attention(query, key, value, /*attn_mask=*/{},
                                                      /*dropout_p=*/0.0, /*is_causal=*/true);
  return at::linear(mixed.transpose(1, 2).reshape(x.sizes()), output_weight_);
}

BlockImpl::BlockImpl(const ModelOptions& options, const anabranch::MoEOptions& moe_options,
                     std::shared_ptr<anabranch::Communicator> expert_parallel,
                     Initializer& initializer) {
  attention_ = register_module("attention", Attention(options, initializer));
  moe_ = register_module("moe", anabranch::MoELayer(moe_options, std::move(expert_parallel)));
  attention_norm_ = register_parameter("attention_norm", initializer.ones({options.hidden}));
  moe_norm_ = register_parameter("moe_norm", initializer.ones({options.hidden}));
}

anabranch::MoEOutput BlockImpl::forward(const torch::Tensor& x, const torch::Tensor& rotation) {
  const auto attended = x + attention_(normalize(x, attention_norm_), rotation);
  auto result = moe_->forward(normalize(attended, moe_norm_));
  result.output = attended + result.output;
  return result;
}

LanguageModelImpl::LanguageModelImpl(
    const Options& options, const std::shared_ptr<anabranch::Communicator>& expert_parallel)
    : head_size_(options.model.hidden / options.model.heads) {
  const int64_t hidden = options.model.hidden;
  Initializer initializer(
      options.training.seed,
      torch::TensorOptions(dtype_of(options.model)).device(torch::Device(options.device)));
  embedding_ = register_parameter("embedding", initializer.normal({kVocabulary, hidden}, 0.5));
  for (int64_t layer = 0; layer < options.model.layers; ++layer) {
    Block block(options.model, moe_options_of(options, layer), expert_parallel, initializer);
    blocks_.push_back(register_module("block" + std::to_string(layer), block));
  }
  norm_ = register_parameter("norm", initializer.ones({hidden}));
  head_ = register_parameter("head", initializer.normal({kVocabulary, hidden}, 0.02));
}

ModelOutput LanguageModelImpl::forward(const torch::Tensor& tokens) {
  torch::Tensor x = at::embedding(embedding_, tokens);
  const auto rotation = rotation_of(tokens.size(1), head_size_, x.options());
  ModelOutput result;
  for (auto& block : blocks_) {
    auto output = block(x, rotation);
    x = output.output;
    result.balance_loss = result.balance_loss.defined() ? result.balance_loss + output.balance_loss
                                                        : output.balance_loss;
    result.z_loss = result.z_loss.defined() ? result.z_loss + output.z_loss : output.z_loss;
    result.expert_load.push_back(output.expert_load);
  }
  result.logits = at::linear(normalize(x, norm_), head_);
  return result;
}

}  // namespace train_lm
