#pragma once

#include <filesystem>
#include <string>

#include "model/model_options.h"

namespace train_lm {

// Models of Hugging Face's transformers, by the config.json of their folder.

/// What is laid out alike in checkpoints: "deepseek_v3", "glm4_moe", "mixtral", "olmoe", "qwen3_moe".
using HfFamily = std::string;

/// Becomes the folder's model. Throws std::invalid_argument with the reason for one that this program cannot
/// compute.
void apply_hf_config(const std::filesystem::path& folder, ModelOptions& model);

/// The `model_type` of a folder.
HfFamily hf_family(const std::filesystem::path& folder);

/// The family that has such a model. Throws std::invalid_argument where none has.
HfFamily hf_family_of(const ModelOptions& model);

/// The text of a config.json for it; `length`: the positions it was trained on.
std::string hf_config(const HfFamily& family, const ModelOptions& model, int64_t length);

}  // namespace train_lm
