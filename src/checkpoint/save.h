#pragma once

#include <anabranch/checkpoint.h>
#include <anabranch/safetensors.h>

#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "checkpoint/index.h"

namespace anabranch {

// The halves of save_checkpoint. Between them the new files are there and durable, and belong to no
// checkpoint.

/// What is stored of a model and an optimizer of this library's.
CheckpointContents contents_of(const torch::nn::Module& model, const ParallelOptimizer& optimizer,
                               const ParallelGroups& groups);

/// What this rank has to write.
struct CheckpointShare {
  std::filesystem::path path;
  std::vector<NamedTensor> tensors;
  std::string optimizer;  ///< its class, the same on every rank
};

/// Part of the files' names, another each time. Collective.
std::string common_tag(Communicator& world);

/// Checks that the ranks' contents make one checkpoint, and makes the directory. Collective.
CheckpointShare share_of(const std::filesystem::path& directory, const std::string& tag,
                         const std::function<CheckpointContents()>& collect,
                         const ParallelGroups& groups);

/// Writes the tensors, durably, and describes the file in JSON; without tensors there is none.
std::string write_share(const std::filesystem::path& path, std::vector<NamedTensor> tensors);

/// The same index on every rank, of what `write` says of its file there. Collective. After an error no file
/// is left.
CheckpointIndex index_of(const CheckpointShare& share, const std::function<std::string()>& write,
                         const CheckpointMetadata& metadata, Communicator& world);

/// The first half as a whole.
CheckpointIndex write_files(const std::filesystem::path& directory, const std::string& tag,
                            const torch::nn::Module& model,
                            const torch::optim::Optimizer* optimizer,
                            const CheckpointMetadata& metadata, const ParallelGroups& groups);

/// The second: puts `index` in place of the former one, and removes the files that no index names any more.
/// On one rank.
void commit(const std::filesystem::path& directory, const std::string& tag,
            const CheckpointIndex& index);
/// The same by rank 0, for all. Collective.
void commit(const std::filesystem::path& directory, const std::string& tag,
            const CheckpointIndex& index, Communicator& world);

}  // namespace anabranch
