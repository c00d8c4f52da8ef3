#include "huggingface/config.h"

#include <algorithm>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <utility>
#include <vector>

#include "require.h"

namespace train_lm {
namespace {

using nlohmann::json;

/// The keys of a config.json, read into a model's options or written from them: each family lists its keys
/// once, for both.
class Keys {
 public:
  static Keys reading(json config) { return {std::move(config), false}; }
  static Keys writing() { return {json::object(), true}; }

  bool is_writing() const { return writing_; }
  const json& config() const { return config_; }

  template <typename Value>
  void value(const char* key, Value& value) {
    if (writing_) {
      config_[key] = value;
      return;
    }
    require(has(key), "config.json has no ", key);
    try {
      config_.at(key).get_to(value);
    } catch (const json::exception& error) {
      throw std::invalid_argument(c10::str("config.json: ", key, ": ", error.what()));
    }
  }

  /// Of which a checkpoint may say nothing.
  template <typename Value>
  void value(const char* key, Value& value, const Value& absent) {
    if (!writing_ && !has(key)) {
      value = absent;
    } else {
      this->value(key, value);
    }
  }

  /// What a model here has in one way alone.
  void only(const char* key, const json& expected, const char* why) {
    if (writing_) {
      config_[key] = expected;
      return;
    }
    require(!has(key) || config_.at(key) == expected, "config.json: ", key, " = ",
            config_.value(key, json()).dump(), ", expected ", expected.dump(), ": ", why);
  }

  bool has(const char* key) const { return config_.contains(key) && !config_.at(key).is_null(); }

 private:
  Keys(json config, bool writing) : config_(std::move(config)), writing_(writing) {}

  json config_;
  bool writing_;
};

/// transformers 5 has it within rope_parameters.
void rope_of(Keys& keys, ModelOptions& model) {
  if (keys.is_writing()) {
    json rope = {
        {"rope_type", "default"}, {"rope_theta", model.rope_theta}, {"partial_rotary_factor", 1.0}};
    keys.value("rope_parameters", rope);
  } else if (keys.has("rope_parameters")) {
    const json& rope = keys.config().at("rope_parameters");
    require(rope.is_object() && rope.value("rope_type", "default") == "default" &&
                rope.value("partial_rotary_factor", 1.0) == 1.0,
            "config.json: rope_parameters = ", rope.dump(),
            ": positions are not stretched, and all numbers of a head are turned");
    model.rope_theta = rope.value("rope_theta", 1e4);
  } else {
    keys.value("rope_theta", model.rope_theta, 1e4);
    keys.only("rope_scaling", nullptr, "positions are not stretched");
  }
}

void common(Keys& keys, ModelOptions& model) {
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

/// DeepSeek-V3's routers and experts beside attention with grouped queries.
void glm4_moe(Keys& keys, ModelOptions& model) {
  keys.value("n_routed_experts", model.experts);
  keys.value("moe_intermediate_size", model.expert_hidden);
  int64_t shared = model.shared_expert_hidden / model.expert_hidden;
  keys.value("n_shared_experts", shared);
  model.shared_expert_hidden = shared * model.expert_hidden;
  keys.value("first_k_dense_replace", model.dense_layers);
  keys.value("intermediate_size", model.dense_hidden);
  keys.value("routed_scaling_factor", model.routing_scale);
  keys.only("n_group", 1, "experts are chosen without groups");
  keys.only("topk_group", 1, "experts are chosen without groups");
  keys.only("attention_bias", false, "the output's projection would have one here");
  keys.only("partial_rotary_factor", 1.0, "all numbers of a head are turned");
  bool normed = model.qk_norm == "head";
  keys.value("use_qk_norm", normed, false);
  model.qk_norm = normed ? "head" : "none";
  whether_renormalized(keys, model, true);
  model.router_score = "sigmoid";
  if (model.bias_rate == 0) model.bias_rate = 0.001;
}

struct Family {
  const char* architecture;
  void (*keys)(Keys&, ModelOptions&);
};

const std::map<HfFamily, Family>& families() {
  static const std::map<HfFamily, Family> all{{"mixtral", {"MixtralForCausalLM", mixtral}},
                                              {"olmoe", {"OlmoeForCausalLM", olmoe}},
                                              {"qwen3_moe", {"Qwen3MoeForCausalLM", qwen3_moe}},
                                              {"glm4_moe", {"Glm4MoeForCausalLM", glm4_moe}}};
  return all;
}

json read_config(const std::filesystem::path& folder) {
  std::ifstream file(folder / "config.json");
  require(file.good(), folder.string(), " has no config.json");
  auto config = json::parse(file, nullptr, /*allow_exceptions=*/false);
  require(config.is_object(), (folder / "config.json").string(), " is not an object of JSON");
  return config;
}

ModelOptions model_of(const HfFamily& family, const json& config) {
  ModelOptions model;
  model.norm = "rms";
  model.glu = true;
  auto keys = Keys::reading(config);
  common(keys, model);
  families().at(family).keys(keys, model);
  return model;
}

json config_of(const HfFamily& family, ModelOptions model) {
  auto keys = Keys::writing();
  common(keys, model);
  families().at(family).keys(keys, model);
  return keys.config();
}

/// Said in one way only.
ModelOptions normal(ModelOptions model) {
  if (model.kv_heads == model.heads) model.kv_heads = 0;
  if (model.head_size * model.heads == model.hidden) model.head_size = 0;
  if (model.renormalize == "auto") model.renormalize = model.top_k > 1 ? "yes" : "no";
  return model;
}

/// Whether what the family's files say makes this model.
bool fits(const HfFamily& family, const ModelOptions& model) {
  auto read = model_of(family, config_of(family, model));
  if (read.bias_rate > 0 && model.bias_rate > 0) read.bias_rate = model.bias_rate;
  return json(read) == json(normal(model));
}

}  // namespace

HfFamily hf_family(const std::filesystem::path& folder) {
  const auto family = read_config(folder).value("model_type", "");
  std::vector<std::string> known;
  for (const auto& [name, keys] : families()) known.push_back(name);
  require(families().contains(family), (folder / "config.json").string(), ": model_type ", family,
          " is none of: ", c10::Join(", ", known));
  return family;
}

void apply_hf_config(const std::filesystem::path& folder, ModelOptions& model) {
  model = model_of(hf_family(folder), read_config(folder));
}

HfFamily hf_family_of(const ModelOptions& model) {
  for (const auto& [name, family] : families()) {
    if (fits(name, model)) return name;
  }
  throw std::invalid_argument(
      "--save-hf: no family of transformers that is known here has such a model "
      "(docs/training.md)");
}

std::string hf_config(const HfFamily& family, const ModelOptions& model, int64_t length) {
  auto config = config_of(family, model);
  config["model_type"] = family;
  config["architectures"] = {families().at(family).architecture};
  config["max_position_embeddings"] = length;
  return config.dump(2) + "\n";
}

}  // namespace train_lm
