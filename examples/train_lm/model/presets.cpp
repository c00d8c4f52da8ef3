// Published models, by the config.json of their repositories on Hugging Face. What a model has and
// this program has not is said beside it: docs/training.md lists it.

#include <map>
#include <vector>

#include "model/model_options.h"
#include "require.h"

namespace train_lm {
namespace {

/// What the published models here have in common.
ModelOptions llama_like() {
  ModelOptions model;
  model.norm = "rms";
  model.glu = true;
  model.dtype = "bfloat16";
  return model;
}

/// allenai/OLMoE-1B-7B-0924
ModelOptions olmoe_1b_7b() {
  ModelOptions model = llama_like();
  model.vocabulary = 50304;
  model.hidden = 2048;
  model.layers = 16;
  model.heads = 16;
  model.qk_norm = "all";
  model.experts = 64;
  model.top_k = 8;
  model.expert_hidden = 1024;
  model.renormalize = "no";
  return model;
}

/// Qwen/Qwen3-30B-A3B
ModelOptions qwen3_30b_a3b() {
  ModelOptions model = llama_like();
  model.vocabulary = 151936;
  model.hidden = 2048;
  model.layers = 48;
  model.norm_epsilon = 1e-6;
  model.heads = 32;
  model.kv_heads = 4;
  model.head_size = 128;
  model.qk_norm = "head";
  model.rope_theta = 1e6;
  model.experts = 128;
  model.top_k = 8;
  model.expert_hidden = 768;
  return model;
}

/// moonshotai/Moonlight-16B-A3B
ModelOptions moonlight_16b_a3b() {
  ModelOptions model = llama_like();
  model.vocabulary = 163840;
  model.hidden = 2048;
  model.layers = 27;
  model.heads = 16;
  model.head_size = 128;
  model.kv_rank = 512;
  model.rope_size = 64;
  model.rope_theta = 5e4;
  model.experts = 64;
  model.top_k = 6;
  model.expert_hidden = 1408;
  model.shared_expert_hidden = 2 * 1408;
  model.dense_layers = 1;
  model.dense_hidden = 11264;
  model.router_score = "sigmoid";
  model.routing_scale = 2.446;
  model.bias_rate = 0.001;
  return model;
}

/// openai/gpt-oss-20b. There every second layer attends to 128 tokens only, attention has a sink for each
/// head, the router a bias, and the activation is clamped with a slope of 1.702; here attention is full and plain, and the activation SiLU.
ModelOptions gpt_oss_20b() {
  ModelOptions model = llama_like();
  model.vocabulary = 201088;
  model.hidden = 2880;
  model.layers = 24;
  model.heads = 64;
  model.kv_heads = 8;
  model.head_size = 64;
  model.rope_theta = 1.5e5;
  model.yarn_factor = 32;
  model.yarn_positions = 4096;
  model.yarn_bounds = "exact";
  model.attention_bias = true;
  model.experts = 32;
  model.top_k = 4;
  model.expert_hidden = 2880;
  model.expert_biases = true;
  return model;
}

/// mistralai/Mixtral-8x7B-v0.1
ModelOptions mixtral_8x7b() {
  ModelOptions model = llama_like();
  model.vocabulary = 32000;
  model.hidden = 4096;
  model.layers = 32;
  model.heads = 32;
  model.kv_heads = 8;
  model.rope_theta = 1e6;
  model.experts = 8;
  model.top_k = 2;
  model.expert_hidden = 14336;
  return model;
}

/// All of that in small, for a CPU: bytes, grouped queries, a dense layer, a shared expert.
ModelOptions tiny() {
  ModelOptions model = llama_like();
  model.hidden = 128;
  model.layers = 3;
  model.heads = 4;
  model.kv_heads = 2;
  model.head_size = 32;
  model.qk_norm = "head";
  model.experts = 8;
  model.top_k = 2;
  model.expert_hidden = 128;
  model.shared_expert_hidden = 128;
  model.dense_layers = 1;
  model.dense_hidden = 256;
  model.dtype = "float32";
  return model;
}

using Preset = ModelOptions (*)();

const std::map<std::string, Preset>& all() {
  static const std::map<std::string, Preset> presets{{"olmoe-1b-7b", olmoe_1b_7b},
                                                     {"qwen3-30b-a3b", qwen3_30b_a3b},
                                                     {"moonlight-16b-a3b", moonlight_16b_a3b},
                                                     {"gpt-oss-20b", gpt_oss_20b},
                                                     {"mixtral-8x7b", mixtral_8x7b},
                                                     {"tiny", tiny}};
  return presets;
}

}  // namespace

const std::vector<std::string>& presets() {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> found;
    for (const auto& [name, make] : all()) found.push_back(name);
    return found;
  }();
  return names;
}

void apply_preset(const std::string& name, ModelOptions& model) {
  const auto found = all().find(name);
  require(found != all().end(), "--preset ", name, " is none of: ", c10::Join(", ", presets()));
  model = found->second();
}

}  // namespace train_lm
