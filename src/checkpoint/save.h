#pragma once

#include <anabranch/checkpoint.h>

#include <filesystem>
#include <string>

#include "checkpoint/index.h"

namespace anabranch {

// The two halves of save_checkpoint. Between them the new files are there and durable, and belong
// to no checkpoint.

/// Every rank's share in a file of its own, `tag` in their names. Collective; the index is the same
/// on every rank. After an error no file of it is left.
CheckpointIndex write_files(const std::filesystem::path& directory, const std::string& tag,
                            const torch::nn::Module& model,
                            const torch::optim::Optimizer* optimizer,
                            const CheckpointMetadata& metadata, const ParallelGroups& groups);

/// Puts `index` in place of the former one, and removes the files that no index names any more. On
/// one rank.
void commit(const std::filesystem::path& directory, const std::string& tag,
            const CheckpointIndex& index);

}  // namespace anabranch
