#pragma once

#include <anabranch/error.h>
#include <anabranch/optimizers.h>
#include <anabranch/parameters.h>
#include <torch/optim/optimizer.h>

#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace anabranch {

/// What a program keeps with a checkpoint, by names of its own: the step, say.
using CheckpointMetadata = std::map<std::string, std::string>;

/// Writes model (parameters and buffers) and optimizer (AdamW, Adam or SGD; may be null) into
/// `directory` as safetensors files, one per writing rank, and `checkpoint.index.json`, whose atomic
/// replacement is the commit: a crash at any moment leaves the old checkpoint or the new one. Expert
/// parameters are stored per expert under the expert's global number, so that any number of ranks
/// can load them. `directory` must be visible to every rank; metadata is rank 0's. Collective over
/// the world. Throws CheckpointError on every rank if any rank fails, and CommunicationError if the
/// ranks' models or optimizer steps differ; the former checkpoint then stands, unless the message says
/// that the new one has taken its place and only its durability is in doubt.
void save_checkpoint(const std::filesystem::path& directory, const torch::nn::Module& model,
                     const torch::optim::Optimizer* optimizer, const CheckpointMetadata& metadata,
                     const ParallelGroups& groups);

/// Loads what `save_checkpoint` wrote, at this or any other number of ranks, and returns its
/// metadata. All or nothing: every file, name, type and shape is checked before the first parameter
/// is touched, and a failure on any rank is a CheckpointError on all. Until then this rank's part lies
/// in host memory besides. The optimizer keeps its options and loses the state it had; without one
/// (null) the checkpoint's is left out. Collective over the world.
CheckpointMetadata load_checkpoint(const std::filesystem::path& directory, torch::nn::Module& model,
                                   torch::optim::Optimizer* optimizer,
                                   const ParallelGroups& groups);

/// The same with an optimizer of this library's, whose tensors are loaded where they lie.
void save_checkpoint(const std::filesystem::path& directory, const torch::nn::Module& model,
                     const ParallelOptimizer& optimizer, const CheckpointMetadata& metadata,
                     const ParallelGroups& groups);
/// The same into such an optimizer, which is to be of the class that was saved.
CheckpointMetadata load_checkpoint(const std::filesystem::path& directory, torch::nn::Module& model,
                                   ParallelOptimizer& optimizer, const ParallelGroups& groups);

/// A checkpoint that a thread writes while training goes on. Where it is not finished, the former one
/// stands.
class BackgroundSave {
 public:
  /// Copies this rank's share into host memory, so that later changes do not reach it, and begins to write
  /// it. Arguments and errors are save_checkpoint's. Collective.
  BackgroundSave(const std::filesystem::path& directory, const torch::nn::Module& model,
                 const ParallelOptimizer& optimizer, const CheckpointMetadata& metadata,
                 const ParallelGroups& groups);
  /// Waits for the thread.
  ~BackgroundSave();

  /// Whether this rank's share has been written, or could not be. Does not wait.
  bool is_written() const;
  /// Waits for all ranks' shares, and puts the checkpoint in the former one's place. Once. Throws what
  /// save_checkpoint does. Collective.
  void finish();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// The same for models and optimizers that are not LibTorch's.

/// What a checkpoint is made of.
struct CheckpointContents {
  /// Parameters and buffers, and what an optimizer keeps of a parameter as `optimizer.SLOT.NAME`:
  /// of its shape and over the ranks as it is, or the slot `step`, an int64 scalar.
  std::vector<ParallelParameter> tensors;
  std::string optimizer;  ///< its class; empty: none
};
/// Writes `contents` as the first of its name does a model and its optimizer. Collective over the world.
void save_checkpoint(const std::filesystem::path& directory, const CheckpointContents& contents,
                     const CheckpointMetadata& metadata, const ParallelGroups& groups);

/// What a checkpoint says of itself, without its tensors.
struct CheckpointDescription {
  std::string index;               ///< the index's text
  std::vector<std::string> names;  ///< of what is stored, an expert's with its number
  std::string optimizer;           ///< its class; empty: none
  CheckpointMetadata metadata;     ///< as it was saved
};
/// Collective.
CheckpointDescription describe_checkpoint(const std::filesystem::path& directory,
                                          Communicator& world);

/// Into `tensors`, the checkpoint of that `index`; without those of an optimizer unless `with_optimizer`.
/// Collective over the world.
void load_checkpoint(const std::filesystem::path& directory, const std::string& index,
                     const std::vector<ParallelParameter>& tensors, bool with_optimizer,
                     const ParallelGroups& groups);

}  // namespace anabranch
