#include "huggingface/config.h"

#include <fstream>
#include <nlohmann/json.hpp>
#include <utility>
#include <vector>

#include "huggingface/families.h"
#include "require.h"

namespace train_lm {
namespace {

using nlohmann::json;

json read_config(const std::filesystem::path& folder) {
  std::ifstream file(folder / "config.json");
  require(file.good(), folder.string(), " has no config.json");
  auto config = json::parse(file, nullptr, /*allow_exceptions=*/false);
  require(config.is_object(), (folder / "config.json").string(), " is not an object of JSON");
  return config;
}

/// Said in one way only.
ModelOptions normal(ModelOptions model) {
  if (model.kv_heads == model.heads) model.kv_heads = 0;
  if (model.head_size * model.heads == model.hidden) model.head_size = 0;
  if (model.value_size == model.head_width()) model.value_size = 0;
  if (model.renormalize == "auto") model.renormalize = model.top_k > 1 ? "yes" : "no";
  return model;
}

ModelOptions model_of(const HfFamily& family, const json& config) {
  ModelOptions model;
  model.norm = "rms";
  model.glu = true;
  auto keys = Keys::reading(config);
  common_keys(keys, model);
  families().at(family).keys(keys, model);
  return normal(std::move(model));
}

json config_of(const HfFamily& family, ModelOptions model) {
  auto keys = Keys::writing();
  common_keys(keys, model);
  families().at(family).keys(keys, model);
  return keys.config();
}

/// Whether what the family's files say makes this model.
bool fits(const HfFamily& family, const ModelOptions& model) {
  if ((family == "deepseek_v3") != (model.kv_rank > 0)) return false;
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
