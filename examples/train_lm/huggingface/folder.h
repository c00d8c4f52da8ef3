#pragma once

#include <anabranch/parameters.h>

#include <filesystem>

#include "model/model.h"
#include "options.h"

namespace train_lm {

/// Fills the model with what the folder's safetensors hold, of experts each rank with its own alone. Throws
/// Refusal where a tensor is missing, is of another shape, or has no place in the model. Collective.
void load_hf(const std::filesystem::path& folder, LanguageModel& model, const ModelOptions& options,
             const anabranch::ParallelGroups& groups);

/// Writes what transformers' from_pretrained loads: config.json and safetensors, of experts each rank of the
/// first expert-parallel group its own. The folder must have no safetensors yet. Throws Refusal. Collective.
void save_hf(const std::filesystem::path& folder, LanguageModel& model, const Options& options,
             const anabranch::ParallelGroups& groups);

}  // namespace train_lm
