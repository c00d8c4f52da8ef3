#pragma once

#include <anabranch/error.h>
#include <anabranch/parameters.h>
#include <torch/optim/optimizer.h>

#include <filesystem>
#include <map>
#include <string>

namespace anabranch {

using CheckpointMetadata = std::map<std::string, std::string>;

/// Writes model and optimizer (may be null) into `directory` as safetensors files, one per writing
/// rank, and `checkpoint.index.json`, whose atomic replacement is the commit: a crash at any moment
/// leaves the old checkpoint or the new one. Expert parameters are stored per expert under the
/// expert's global number, so that any number of ranks can load them. `directory` must be visible to
/// every rank. Collective over the world. Throws CheckpointError.
void save_checkpoint(const std::filesystem::path& directory, const torch::nn::Module& model,
                     const torch::optim::Optimizer* optimizer, const CheckpointMetadata& metadata,
                     const ParallelGroups& groups);

/// Loads what `save_checkpoint` wrote, at this or any other number of ranks, and returns its
/// metadata. All or nothing: every file, name, type and shape is checked before the first parameter
/// is touched, and a failure on any rank is a CheckpointError on all. Collective over the world.
CheckpointMetadata load_checkpoint(const std::filesystem::path& directory, torch::nn::Module& model,
                                   torch::optim::Optimizer* optimizer,
                                   const ParallelGroups& groups);

}  // namespace anabranch
