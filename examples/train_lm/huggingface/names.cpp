#include "huggingface/names.h"

#include <map>

#include "require.h"

namespace train_lm {
namespace {

using Tensors = std::vector<HfTensor>;

/// Queries, keys and values of one projection.
Tensors of_heads(const ModelOptions& model, const std::string& prefix, const char* kind) {
  const int64_t queries = model.heads * model.head_width();
  const int64_t keys = model.key_heads() * model.head_width();
  const auto name = [&](const char* which) {
    return prefix + "self_attn." + which + "_proj." + kind;
  };
  return {{name("q"), 0, queries, model.heads},
          {name("k"), queries, keys, model.key_heads()},
          {name("v"), queries + keys, keys}};
}

Tensors norm_of(const ModelOptions& model, const std::string& prefix, const char* which,
                int64_t heads) {
  return {
      {prefix + "self_attn." + which + "_norm.weight", 0, 0, model.qk_norm == "head" ? 1 : heads}};
}

/// Its rotated numbers are neighbours there as well.
Tensors of_latent_attention(const ModelOptions& model, const std::string& prefix,
                            const std::string& name) {
  if (name == "query") {
    return {{prefix + (model.query_rank > 0 ? "q_b_proj" : "q_proj") + ".weight"}};
  }
  static const std::map<std::string, std::string> same{{"query_down", "q_a_proj"},
                                                       {"query_norm", "q_a_layernorm"},
                                                       {"kv_down", "kv_a_proj_with_mqa"},
                                                       {"kv_norm", "kv_a_layernorm"},
                                                       {"kv_up", "kv_b_proj"},
                                                       {"output", "o_proj"}};
  return {{prefix + same.at(name) + ".weight"}};
}

/// A GLU's gate and up part.
Tensors gate_and_up(const std::string& prefix, int64_t inner, const char* gate, const char* up) {
  return {{prefix + gate + ".weight", 0, inner}, {prefix + up + ".weight", inner, inner}};
}

Tensors of_experts(const HfFamily& family, const ModelOptions& model, const std::string& layer,
                   const std::string& name, int64_t expert) {
  const bool mixtral = family == "mixtral";
  const std::string moe = layer + (mixtral ? "block_sparse_moe." : "mlp.");
  const std::string experts = moe + "experts." + std::to_string(expert) + ".";
  const std::string shared = moe + "shared_experts.";
  if (name == "router.weight") return {{moe + "gate.weight"}};
  if (name == "router.expert_bias") return {{moe + "gate.e_score_correction_bias"}};
  if (name == "experts.up_weight") {
    return gate_and_up(experts, model.expert_hidden, mixtral ? "w1" : "gate_proj",
                       mixtral ? "w3" : "up_proj");
  }
  if (name == "experts.down_weight")
    return {{experts + (mixtral ? "w2" : "down_proj") + ".weight"}};
  if (name == "shared_expert.up_weight") {
    return gate_and_up(shared, model.shared_expert_hidden, "gate_proj", "up_proj");
  }
  if (name == "shared_expert.down_weight") return {{shared + "down_proj.weight"}};
  return {};
}

Tensors of_layer(const HfFamily& family, const ModelOptions& model, const std::string& layer,
                 const std::string& name, int64_t expert) {
  if (name.starts_with("moe.")) return of_experts(family, model, layer, name.substr(4), expert);
  if (name.starts_with("attention.") && model.kv_rank > 0) {
    return of_latent_attention(model, layer + "self_attn.", name.substr(10));
  }
  if (name == "attention.qkv") return of_heads(model, layer, "weight");
  if (name == "attention.qkv_bias") return of_heads(model, layer, "bias");
  if (name == "attention.query_norm") return norm_of(model, layer, "q", model.heads);
  if (name == "attention.key_norm") return norm_of(model, layer, "k", model.key_heads());
  if (name == "feed_forward.up") {
    return gate_and_up(layer + "mlp.", model.dense_hidden, "gate_proj", "up_proj");
  }
  static const std::map<std::string, std::string> same{
      {"attention_norm", "input_layernorm.weight"},
      {"moe_norm", "post_attention_layernorm.weight"},
      {"attention.output", "self_attn.o_proj.weight"},
      {"attention.output_bias", "self_attn.o_proj.bias"},
      {"feed_forward.down", "mlp.down_proj.weight"}};
  const auto found = same.find(name);
  return found == same.end() ? Tensors{} : Tensors{{layer + found->second}};
}

}  // namespace

std::vector<HfTensor> hf_tensors(const HfFamily& family, const ModelOptions& model,
                                 const std::string& name, int64_t expert) {
  static const std::map<std::string, std::string> same{{"embedding", "model.embed_tokens.weight"},
                                                       {"norm", "model.norm.weight"},
                                                       {"head", "lm_head.weight"}};
  Tensors tensors;
  const auto dot = name.find('.');
  if (const auto found = same.find(name); found != same.end()) {
    tensors = {{found->second}};
  } else if (name.starts_with("block") && dot != std::string::npos) {
    const auto layer = "model.layers." + name.substr(5, dot - 5) + ".";
    tensors = of_layer(family, model, layer, name.substr(dot + 1), expert);
  }
  require(!tensors.empty(), "models of ", family, " have nothing like ", name);
  return tensors;
}

}  // namespace train_lm
