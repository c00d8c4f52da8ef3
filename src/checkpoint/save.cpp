#include "checkpoint/save.h"

#include <ATen/ATen.h>
#include <anabranch/error.h>
#include <anabranch/safetensors.h>

#include <algorithm>
#include <cstdio>
#include <functional>
#include <nlohmann/json.hpp>
#include <random>
#include <regex>

#include "checkpoint/collective.h"
#include "checkpoint/file.h"
#include "checkpoint/optimizer_state.h"
#include "checkpoint/state.h"
#include "checkpoint/stored_experts.h"
#include "communicator/agreement.h"
#include "placement/slices.h"

namespace anabranch {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

std::string file_name(const std::string& tag, const Communicator& world) {
  char ranks[64];
  std::snprintf(ranks, sizeof(ranks), "rank%05d-of-%05d", world.rank(), world.size());
  return "model-" + tag + "-" + ranks + ".safetensors";
}

std::string aside_name(const std::string& tag) { return kIndexName + ("." + tag); }

/// 16 hexadecimal digits, another 16 each time.
std::string random_tag() {
  std::random_device device;
  char text[17];
  std::snprintf(text, sizeof(text), "%08x%08x", device(), device());
  return text;
}

CheckpointContents contents_of(const torch::nn::Module& model,
                               const torch::optim::Optimizer* optimizer,
                               const ParallelGroups& groups) {
  CheckpointContents contents{model_tensors(model, groups), ""};
  if (optimizer == nullptr) return contents;
  const auto& reader = state_of(*optimizer);
  contents.optimizer = reader.kind();
  for (const auto& [parameter, options] : optimized_parameters(*optimizer, model)) {
    const auto state = optimizer->state().find(parameter.tensor.unsafeGetTensorImpl());
    if (state == optimizer->state().end()) continue;
    for (auto& [slot, tensor] : reader.read(*state->second)) {
      contents.tensors.push_back(optimizer_tensor(slot, parameter, tensor));
    }
  }
  return contents;
}

/// What must be the same on every rank for the shares to make one checkpoint.
void check_same_tensors(const std::vector<ParallelParameter>& tensors, Communicator& world) {
  std::vector<std::pair<std::string, std::string>> fields;
  for (const auto& parameter : tensors) {
    const auto& tensor = parameter.tensor;
    auto shape = tensor.sizes().vec();
    if (parameter.is_expert) {
      shape = whole_sizes(tensor.sizes().slice(1), parameter.cut);
      shape.insert(shape.begin(), parameter.num_experts);
    }
    std::string text = c10::str(tensor.scalar_type(), " ", at::IntArrayRef(shape));
    if (parameter.placement != nullptr) text += " in " + parameter.placement->describe();
    // Scalars that count: the optimizer's steps.
    if (tensor.dim() == 0 && is_optimizer_tensor(parameter.name) && parameter.owner < 0) {
      text += c10::str(" ", tensor.item<int64_t>());
    }
    fields.emplace_back(parameter.name, text);
  }
  check_agreement(world, fields);
}

/// This rank's part: experts one by one; and replicated tensors, each with its owner, or with the rank that
/// has least to write so far. Collective where experts lie in slices.
std::vector<NamedTensor> tensors_of_share(const std::vector<ParallelParameter>& tensors,
                                          const ParallelGroups& groups) {
  const int64_t rank = groups.world->rank();
  std::vector<int64_t> load(groups.world->size());
  std::vector<NamedTensor> share;
  for (const auto& parameter : tensors) {
    const auto& tensor = parameter.tensor;
    if (!parameter.is_expert) continue;
    const auto sizes = whole_sizes(tensor.sizes().slice(1), parameter.cut);
    const int64_t bytes = c10::multiply_integers(sizes) * tensor.element_size();
    for (const auto& [expert, writer, whole] : stored_experts(parameter, groups)) {
      load[writer] += bytes;
      if (rank == writer) share.push_back({expert_name(parameter.name, expert), whole});
    }
  }
  for (const auto& parameter : tensors) {
    if (parameter.is_expert) continue;
    const auto writer = parameter.owner >= 0
                            ? parameter.owner
                            : std::min_element(load.begin(), load.end()) - load.begin();
    load[writer] += static_cast<int64_t>(parameter.tensor.nbytes());
    if (rank == writer) share.push_back({parameter.name, parameter.tensor});
  }
  return share;
}

void add_share(CheckpointIndex& index, const std::string& report) {
  const Json json = Json::parse(report);
  if (json.empty()) return;
  const auto file = json.at("file").get<std::string>();
  index.files.emplace(file, CheckpointIndex::StoredFile{json.at("bytes").get<int64_t>(),
                                                        json.at("header_crc32").get<uint32_t>()});
  for (const auto& [name, checksum] : json.at("crc32").items()) {
    const CheckpointIndex::StoredTensor stored{file, checksum.get<uint32_t>()};
    if (!index.tensors.emplace(name, stored).second) {
      throw CheckpointError("two tensors of the model are stored as '" + name + "'");
    }
  }
}

/// Files of saves that were replaced, or that never came to their end. The new checkpoint stands:
/// one that cannot be removed is worth a warning, and is tried again by the next save.
void remove_stale_files(const fs::path& directory, const CheckpointIndex& index) {
  static const std::regex ours(
      "model-[0-9a-f]{16}-rank[0-9]{5,}-of-[0-9]{5,}\\.safetensors|"
      "checkpoint\\.index\\.json\\.[0-9a-f]{16}");
  std::vector<fs::path> stale;
  for (const auto& entry : fs::directory_iterator(directory)) {
    const auto name = entry.path().filename().string();
    if (std::regex_match(name, ours) && !index.files.contains(name)) {
      stale.push_back(entry.path());
    }
  }
  for (const auto& path : stale) {
    std::error_code error;
    if (!fs::remove(path, error) && error) {
      TORCH_WARN("remove ", path.string(), ": ", error.message());
    }
  }
}

/// Every rank may see another file system: what rank 0 does not see is not in the checkpoint.
void check_files_visible(const fs::path& directory, const CheckpointIndex& index) {
  for (const auto& [name, file] : index.files) {
    std::error_code error;
    const auto found = fs::file_size(directory / name, error);
    if (error || static_cast<int64_t>(found) != file.bytes) {
      throw CheckpointError("rank 0 does not see " + (directory / name).string() +
                            ": the directory must be shared by all ranks");
    }
  }
}

CheckpointIndex write_files(const fs::path& directory, const std::string& tag,
                            const std::function<CheckpointContents()>& collect,
                            const CheckpointMetadata& metadata, const ParallelGroups& groups) {
  auto share = share_of(directory, tag, collect, groups);
  const auto write = [&] { return write_share(share.path, std::move(share.tensors)); };
  return index_of(share, write, metadata, *groups.world);
}

void save_collected(const fs::path& directory, const std::function<CheckpointContents()>& collect,
                    const CheckpointMetadata& metadata, const ParallelGroups& groups) {
  auto& world = *groups.world;
  const auto tag = common_tag(world);
  const auto index = write_files(directory, tag, collect, metadata, groups);
  commit(directory, tag, index, world);
}

}  // namespace

CheckpointContents contents_of(const torch::nn::Module& model, const ParallelOptimizer& optimizer,
                               const ParallelGroups& groups) {
  return {with_state(model_tensors(model, groups), optimizer), optimizer.name()};
}

std::string common_tag(Communicator& world) {
  return broadcast_string(world, world.rank() == 0 ? random_tag() : "");
}

CheckpointShare share_of(const fs::path& directory, const std::string& tag,
                         const std::function<CheckpointContents()>& collect,
                         const ParallelGroups& groups) {
  const at::NoGradGuard no_grad;
  auto& world = *groups.world;
  CheckpointContents contents;
  do_together(world, [&] {
    contents = collect();
    if (world.rank() == 0) make_directories(directory);
  });
  check_same_tensors(contents.tensors, world);
  return {directory / file_name(tag, world), tensors_of_share(contents.tensors, groups),
          contents.optimizer};
}

std::string write_share(const fs::path& path, std::vector<NamedTensor> share) {
  if (share.empty()) return "{}";
  const auto written = write_safetensors(path, std::move(share));
  sync_directory(path.parent_path());
  const Json report{{"file", path.filename().string()},
                    {"bytes", written.bytes},
                    {"header_crc32", written.header_checksum},
                    {"crc32", written.checksums}};
  return report.dump();
}

CheckpointIndex index_of(const CheckpointShare& share, const std::function<std::string()>& write,
                         const CheckpointMetadata& metadata, Communicator& world) {
  try {
    std::string report;
    do_together(world, [&] { report = write(); });
    CheckpointIndex index{metadata, share.optimizer, {}, {}};
    for (const auto& text : all_gather_strings(world, report)) add_share(index, text);
    return index;
  } catch (...) {
    std::error_code ignored;  // the first error is the one to report
    fs::remove(share.path, ignored);
    throw;
  }
}

CheckpointIndex write_files(const fs::path& directory, const std::string& tag,
                            const torch::nn::Module& model,
                            const torch::optim::Optimizer* optimizer,
                            const CheckpointMetadata& metadata, const ParallelGroups& groups) {
  const auto collect = [&] { return contents_of(model, optimizer, groups); };
  return write_files(directory, tag, collect, metadata, groups);
}

void commit(const fs::path& directory, const std::string& tag, const CheckpointIndex& index) {
  const auto aside = directory / aside_name(tag);
  try {
    check_files_visible(directory, index);
    const auto text = to_json(index);
    File file = File::create(aside);
    file.write(text.data(), static_cast<int64_t>(text.size()));
    file.sync();
    sync_directory(directory);
    rename_file(aside, directory / kIndexName);
  } catch (...) {
    std::error_code ignored;  // the first error is the one to report
    fs::remove(aside, ignored);
    for (const auto& [name, written] : index.files) fs::remove(directory / name, ignored);
    throw;
  }
  try {
    sync_directory(directory);
  } catch (const CheckpointError& error) {
    // The former one's files stay: a crash of the machine may bring its index back.
    throw CheckpointError(c10::str("the new checkpoint in ", directory.string(),
                                   " has taken the former one's place, but a crash of the machine "
                                   "may undo that: ",
                                   error.what()));
  }
  remove_stale_files(directory, index);
}

void commit(const fs::path& directory, const std::string& tag, const CheckpointIndex& index,
            Communicator& world) {
  do_together(world, [&] {
    if (world.rank() == 0) commit(directory, tag, index);
  });
}

void save_checkpoint(const fs::path& directory, const torch::nn::Module& model,
                     const torch::optim::Optimizer* optimizer, const CheckpointMetadata& metadata,
                     const ParallelGroups& groups) {
  const auto collect = [&] { return contents_of(model, optimizer, groups); };
  save_collected(directory, collect, metadata, groups);
}

void save_checkpoint(const fs::path& directory, const torch::nn::Module& model,
                     const ParallelOptimizer& optimizer, const CheckpointMetadata& metadata,
                     const ParallelGroups& groups) {
  const auto collect = [&] { return contents_of(model, optimizer, groups); };
  save_collected(directory, collect, metadata, groups);
}

void save_checkpoint(const fs::path& directory, const CheckpointContents& contents,
                     const CheckpointMetadata& metadata, const ParallelGroups& groups) {
  const auto collect = [&] {
    for (const auto& tensor : contents.tensors) check_placement(tensor, groups);
    return contents;
  };
  save_collected(directory, collect, metadata, groups);
}

}  // namespace anabranch
