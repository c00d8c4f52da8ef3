#include "huggingface/families.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

namespace train_lm {
namespace {

using nlohmann::json;

json written_rope(const ModelOptions& model) {
  json rope = {
      {"rope_type", "default"}, {"rope_theta", model.rope_theta}, {"partial_rotary_factor", 1.0}};
  if (model.yarn_factor == 1) return rope;
  rope.update({{"rope_type", "yarn"},
               {"factor", model.yarn_factor},
               {"original_max_position_embeddings", model.yarn_positions},
               {"beta_fast", model.yarn_beta_fast},
               {"beta_slow", model.yarn_beta_slow},
               {"truncate", model.yarn_bounds == "whole"}});
  if (model.yarn_scale > 0) rope["attention_factor"] = model.yarn_scale;
  if (model.yarn_mscale > 0) rope["mscale"] = model.yarn_mscale;
  if (model.yarn_mscale_all > 0) rope["mscale_all_dim"] = model.yarn_mscale_all;
  return rope;
}

/// Of `rope`, that of `key`.
void read_stretching(const char* key, const json& rope, ModelOptions& model) {
  const auto type = rope.is_object() ? rope.value("rope_type", rope.value("type", "default")) : "";
  require((type == "default" || type == "yarn") && rope.value("partial_rotary_factor", 1.0) == 1.0,
          "config.json: ", key, " = ", rope.dump(),
          ": positions are stretched by YaRN alone, and all numbers of a head are turned");
  if (type == "default") return;
  // Where a key is null or missing, transformers has these.
  const auto number = [&](const char* name, double absent) {
    return rope.contains(name) && !rope[name].is_null() ? rope[name].get<double>() : absent;
  };
  model.yarn_factor = number("factor", 0);
  model.yarn_positions = static_cast<int64_t>(number("original_max_position_embeddings", 0));
  require(model.yarn_factor >= 1 && model.yarn_positions > 0, "config.json: ", key, " = ",
          rope.dump(), ", expected a factor and original_max_position_embeddings");
  model.yarn_beta_fast = number("beta_fast", 32);
  model.yarn_beta_slow = number("beta_slow", 1);
  model.yarn_bounds = rope.value("truncate", true) ? "whole" : "exact";
  model.yarn_scale = number("attention_factor", 0);
  model.yarn_mscale = number("mscale", 0);
  model.yarn_mscale_all = number("mscale_all_dim", 0);
}

/// transformers 5 has it within rope_parameters.
void rope_of(Keys& keys, ModelOptions& model) {
  if (keys.is_writing()) {
    auto rope = written_rope(model);
    keys.value("rope_parameters", rope);
  } else if (keys.has("rope_parameters")) {
    const json& rope = keys.config().at("rope_parameters");
    read_stretching("rope_parameters", rope, model);
    model.rope_theta = rope.value("rope_theta", 1e4);
  } else {
    keys.value("rope_theta", model.rope_theta, 1e4);
    if (keys.has("rope_scaling")) {
      read_stretching("rope_scaling", keys.config().at("rope_scaling"), model);
    }
  }
}

void bias_of_attention(Keys& keys, ModelOptions& model) {
  keys.value("attention_bias", model.attention_bias, false);
}

void whether_renormalized(Keys& keys, ModelOptions& model, bool absent) {
  bool value = model.renormalize == "auto" ? model.top_k > 1 : model.renormalize == "yes";
  keys.value("norm_topk_prob", value, absent);
  model.renormalize = value ? "yes" : "no";
}

void mixtral(Keys& keys, ModelOptions& model) {
  keys.value("num_local_experts", model.experts);
  keys.value("intermediate_size", model.expert_hidden);
  keys.only("sliding_window", nullptr, "attention is full");
  keys.only("router_jitter_noise", 0.0, "routers have no jitter");
  model.renormalize = "yes";
  model.qk_norm = "none";
}

void olmoe(Keys& keys, ModelOptions& model) {
  keys.value("num_experts", model.experts);
  keys.value("intermediate_size", model.expert_hidden);
  keys.only("clip_qkv", nullptr, "queries, keys and values are not clamped");
  bias_of_attention(keys, model);
  whether_renormalized(keys, model, false);
  model.qk_norm = "all";
}

void qwen3_moe(Keys& keys, ModelOptions& model) {
  // As transformers 5 writes it, and as the published folders have it.
  keys.value(keys.has("num_local_experts") ? "num_local_experts" : "num_experts", model.experts);
  keys.value("moe_intermediate_size", model.expert_hidden);
  keys.only("decoder_sparse_step", 1, "all layers have experts but the first ones");
  keys.only("use_sliding_window", false, "attention is full");
  bias_of_attention(keys, model);
  whether_renormalized(keys, model, false);
  std::vector<int64_t> dense, first;
  for (int64_t layer = 0; layer < model.dense_layers; ++layer) dense.push_back(layer);
  keys.value("mlp_only_layers", dense, {});
  model.dense_layers = static_cast<int64_t>(dense.size());
  for (int64_t layer = 0; layer < model.dense_layers; ++layer) first.push_back(layer);
  require(dense == first, "config.json: mlp_only_layers: only the first layers can be dense");
  keys.value("intermediate_size", model.dense_hidden, model.dense_hidden);
  model.qk_norm = "head";
}

/// Routers, experts and first layers of DeepSeek-V3.
void deepseek_experts(Keys& keys, ModelOptions& model) {
  keys.value("n_routed_experts", model.experts);
  keys.value("moe_intermediate_size", model.expert_hidden);
  int64_t shared = model.shared_expert_hidden / model.expert_hidden;
  keys.value("n_shared_experts", shared);
  model.shared_expert_hidden = shared * model.expert_hidden;
  keys.value("first_k_dense_replace", model.dense_layers);
  keys.value("intermediate_size", model.dense_hidden);
  keys.value("routed_scaling_factor", model.routing_scale);
  keys.value("n_group", model.expert_groups, int64_t{1});
  keys.value("topk_group", model.top_groups, int64_t{1});
  keys.only("attention_bias", false, "the output's projection would have one here");
  whether_renormalized(keys, model, true);
  model.router_score = "sigmoid";
  if (model.bias_rate == 0) model.bias_rate = 0.001;
}

/// Beside attention with grouped queries.
void glm4_moe(Keys& keys, ModelOptions& model) {
  deepseek_experts(keys, model);
  keys.only("partial_rotary_factor", 1.0, "all numbers of a head are turned");
  bool normed = model.qk_norm == "head";
  keys.value("use_qk_norm", normed, false);
  model.qk_norm = normed ? "head" : "none";
}

/// Beside latent attention, whose head has a width without positions, one with, and one of values.
void deepseek_v3(Keys& keys, ModelOptions& model) {
  deepseek_experts(keys, model);
  int64_t width = model.head_width(), values = model.value_width();
  keys.value("kv_lora_rank", model.kv_rank);
  keys.value("qk_rope_head_dim", model.rope_size);
  keys.value("qk_nope_head_dim", width);
  keys.value("v_head_dim", values);
  model.head_size = width;
  model.value_size = values;
  keys.only("rope_interleave", true, "rotated numbers are pairs of neighbours");
  // What published folders say, and transformers takes for granted.
  keys.only("scoring_func", "sigmoid", "scores are sigmoids");
  keys.only("topk_method", "noaux_tc", "experts are balanced by biases");
  keys.only("moe_layer_freq", 1, "all layers have experts but the first ones");
  if (keys.is_writing() && model.query_rank == 0) {
    keys.only("q_lora_rank", nullptr, "");
  } else {
    keys.value("q_lora_rank", model.query_rank, int64_t{0});
  }
  // Another meaning than elsewhere, of which `common` has the width without positions.
  if (keys.is_writing()) keys.value("head_dim", model.rope_size);
}

}  // namespace

void common_keys(Keys& keys, ModelOptions& model) {
  keys.value("vocab_size", model.vocabulary);
  keys.value("hidden_size", model.hidden);
  keys.value("num_hidden_layers", model.layers);
  keys.value("num_attention_heads", model.heads);
  int64_t key_heads = model.key_heads(), width = model.head_width();
  keys.value("num_key_value_heads", key_heads, model.heads);
  model.kv_heads = key_heads == model.heads ? 0 : key_heads;
  keys.value("head_dim", width, model.hidden / std::max<int64_t>(model.heads, 1));
  model.head_size = width * model.heads == model.hidden ? 0 : width;
  keys.value("rms_norm_eps", model.norm_epsilon);
  keys.value("tie_word_embeddings", model.tied_head, false);
  keys.value("num_experts_per_tok", model.top_k);
  keys.only("hidden_act", "silu", "experts here are SwiGLU");
  rope_of(keys, model);
  std::string type = model.dtype;
  keys.value(keys.is_writing() || keys.has("dtype") ? "dtype" : "torch_dtype", type,
             std::string("float32"));
  model.dtype = type == "float16" ? "float32" : type;
}

const std::map<HfFamily, Family>& families() {
  static const std::map<HfFamily, Family> all{
      {"deepseek_v3", {"DeepseekV3ForCausalLM", deepseek_v3}},
      {"mixtral", {"MixtralForCausalLM", mixtral}},
      {"olmoe", {"OlmoeForCausalLM", olmoe}},
      {"qwen3_moe", {"Qwen3MoeForCausalLM", qwen3_moe}},
      {"glm4_moe", {"Glm4MoeForCausalLM", glm4_moe}}};
  return all;
}

}  // namespace train_lm
