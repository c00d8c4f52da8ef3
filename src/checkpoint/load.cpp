#include <ATen/ATen.h>
#include <anabranch/checkpoint.h>
#include <anabranch/error.h>
#include <anabranch/safetensors.h>

#include <algorithm>
#include <set>

#include "checkpoint/collective.h"
#include "checkpoint/file.h"
#include "checkpoint/index.h"
#include "checkpoint/optimizer_state.h"
#include "checkpoint/require.h"
#include "checkpoint/state.h"
#include "placement/slices.h"

namespace anabranch {
namespace {

namespace fs = std::filesystem;

// A model of a million tensors needs about a quarter of it.
constexpr int64_t kMaxIndexBytes = int64_t{1} << 30;

std::string read_text(const fs::path& path) {
  const File file = File::open(path);
  const int64_t bytes = file.size();
  require(bytes <= kMaxIndexBytes, path.string(), " has ", bytes, " bytes: too large for an index");
  std::string text(bytes, '\0');
  file.read(text.data(), static_cast<int64_t>(text.size()), 0);
  return text;
}

/// The tensors of a checkpoint, each checked when it is read. Opens the files that are asked for.
class TensorSource {
 public:
  TensorSource(fs::path directory, const CheckpointIndex& index)
      : directory_(std::move(directory)), index_(index) {}

  bool contains(const std::string& name) const { return index_.tensors.contains(name); }

  /// On the CPU, of the type and shape given.
  torch::Tensor read(const std::string& name, at::ScalarType dtype, at::IntArrayRef shape) {
    const auto& stored = index_.tensors.at(name);
    const auto& file = open(stored.file);
    const auto& entry = file.entries().at(name);
    require(entry.dtype == dtype, "'", name, "' is stored as ", safetensors_dtype(entry.dtype),
            ", the model's is ", safetensors_dtype(dtype), "; loading does not convert");
    require(at::IntArrayRef(entry.shape) == shape, "'", name, "' is stored with shape ",
            at::IntArrayRef(entry.shape), ", the model's is ", shape);
    auto tensor = file.read(name);
    require(checksum(tensor) == stored.checksum, "'", name, "' in ", stored.file,
            " is corrupt: its checksum does not match");
    return tensor;
  }

 private:
  const SafetensorsReader& open(const std::string& name) {
    const auto known = files_.find(name);
    if (known != files_.end()) return known->second;
    SafetensorsReader file(directory_ / name);
    const auto& expected = index_.files.at(name);
    require(file.file_bytes() == expected.bytes, name, " has ", file.file_bytes(),
            " bytes, the index says ", expected.bytes);
    require(file.header_checksum() == expected.header_checksum, "the header of ", name,
            " is corrupt: its checksum does not match");
    const auto count = std::count_if(index_.tensors.begin(), index_.tensors.end(),
                                     [&](const auto& item) { return item.second.file == name; });
    bool same = count == static_cast<int64_t>(file.entries().size());
    for (const auto& [tensor, entry] : file.entries()) {
      const auto stored = index_.tensors.find(tensor);
      same = same && stored != index_.tensors.end() && stored->second.file == name;
    }
    require(same, name, " does not hold the tensors that the index says");
    return files_.emplace(name, std::move(file)).first->second;
  }

  fs::path directory_;
  const CheckpointIndex& index_;
  std::map<std::string, SafetensorsReader> files_;
};

/// What was read and checked, ready to be put into model and optimizer.
struct Staged {
  struct Copy {
    torch::Tensor destination;
    torch::Tensor values;
  };
  std::vector<Copy> tensors;
  std::vector<std::pair<void*, std::unique_ptr<torch::optim::OptimizerParamState>>> states;
};

/// What the checkpoint has of an optimizer's state for one parameter: all slots, or none if the
/// parameter had not been updated.
struct ExpectedState {
  ParallelParameter parameter;
  std::vector<std::string> slots;
};

std::string first_name(const ParallelParameter& tensor) {
  return tensor.is_expert ? expert_name(tensor.name, 0) : tensor.name;
}

std::vector<ExpectedState> expected_states(const torch::nn::Module& model,
                                           const torch::optim::Optimizer& optimizer,
                                           const TensorSource& source) {
  std::vector<ExpectedState> expected;
  for (const auto& [parameter, options] : optimized_parameters(optimizer, model)) {
    auto slots = state_of(optimizer).slots(*options);
    const bool any = std::any_of(slots.begin(), slots.end(), [&](const std::string& slot) {
      return source.contains(first_name(optimizer_tensor(slot, parameter, {})));
    });
    if (any) expected.push_back({parameter, std::move(slots)});
  }
  return expected;
}

std::set<std::string> stored_names(const ParallelParameter& tensor, const TensorSource& source) {
  if (!tensor.is_expert) return {tensor.name};
  int64_t stored = 0;
  while (source.contains(expert_name(tensor.name, stored))) ++stored;
  require(stored == 0 || stored == tensor.num_experts, "the checkpoint has ", stored,
          " experts of '", tensor.name, "', the model has ", tensor.num_experts);
  std::set<std::string> names;
  for (int64_t expert = 0; expert < tensor.num_experts; ++expert) {
    names.insert(expert_name(tensor.name, expert));
  }
  return names;
}

void check_names(const std::vector<ParallelParameter>& expected, const CheckpointIndex& index,
                 const TensorSource& source, bool with_optimizer) {
  std::set<std::string> names;
  for (const auto& tensor : expected) names.merge(stored_names(tensor, source));
  for (const auto& name : names) {
    require(index.tensors.contains(name), "the checkpoint has no '", name, "'");
  }
  for (const auto& [name, stored] : index.tensors) {
    if (!with_optimizer && is_optimizer_tensor(name)) continue;
    require(names.contains(name), "the checkpoint has '", name, "', the model has not");
  }
}

/// This rank's part of a tensor, into `values`, which has the part's shape.
void read_part(const ParallelParameter& tensor, TensorSource& source, torch::Tensor& values) {
  const auto dtype = values.scalar_type();
  if (!tensor.is_expert) {
    values.copy_(source.read(tensor.name, dtype, values.sizes()));
    return;
  }
  for (int64_t local = 0; local < values.size(0); ++local) {
    const HeldExpert held = tensor.held(local);
    const auto sizes = values.sizes().slice(1);
    const auto whole = source.read(expert_name(tensor.name, held.expert), dtype,
                                   held.slices > 1 ? whole_sizes(sizes, tensor.cut) : sizes.vec());
    copy_slice(values[local], whole, held, tensor.cut);
  }
}

ParameterState read_state(const ExpectedState& expected, TensorSource& source) {
  ParameterState state;
  for (const auto& slot : expected.slots) {
    auto values =
        slot == kStep ? at::empty({}, at::kLong) : at::empty_like(expected.parameter.tensor);
    read_part(optimizer_tensor(slot, expected.parameter, values), source, values);
    state.emplace(slot, values);
  }
  return state;
}

/// This rank's part of each, on the CPU; undefined for those that it has no part of.
std::vector<torch::Tensor> read_parts(const std::vector<ParallelParameter>& tensors,
                                      TensorSource& source) {
  std::vector<torch::Tensor> parts;
  for (const auto& tensor : tensors) {
    parts.emplace_back();
    if (tensor.tensor.is_meta()) continue;  // another rank's
    parts.back() = at::empty(tensor.tensor.sizes(), tensor.tensor.options().device(at::kCPU));
    read_part(tensor, source, parts.back());
  }
  return parts;
}

void put(const std::vector<torch::Tensor>& parts, const std::vector<ParallelParameter>& tensors) {
  for (size_t i = 0; i < parts.size(); ++i) {
    if (parts[i].defined()) tensors[i].tensor.copy_(parts[i]);
  }
}

/// Rank 0's. Collective.
std::string read_index(const fs::path& directory, Communicator& world) {
  std::string text;
  do_together(world, [&] {
    if (world.rank() == 0) text = read_text(directory / kIndexName);
  });
  return broadcast_string(world, text);
}

void check_optimizer(const CheckpointIndex& index, const std::string& kind) {
  require(index.optimizer == kind, "the checkpoint holds ",
          index.optimizer.empty() ? "no optimizer" : index.optimizer, ", state was asked for ",
          kind);
}

Staged stage(const fs::path& directory, const CheckpointIndex& index,
             const torch::nn::Module& model, const torch::optim::Optimizer* optimizer,
             const ParallelGroups& groups) {
  TensorSource source(directory, index);
  const auto tensors = model_tensors(model, groups);
  auto expected = tensors;
  std::vector<ExpectedState> states;
  if (optimizer != nullptr) {
    check_optimizer(index, state_of(*optimizer).kind());
    states = expected_states(model, *optimizer, source);
  }
  for (const auto& state : states) {
    for (const auto& slot : state.slots) {
      expected.push_back(optimizer_tensor(slot, state.parameter, {}));
    }
  }
  check_names(expected, index, source, optimizer != nullptr);

  Staged staged;
  const auto parts = read_parts(tensors, source);
  for (size_t i = 0; i < parts.size(); ++i) {
    staged.tensors.push_back({tensors[i].tensor, parts[i]});
  }
  for (const auto& state : states) {
    staged.states.emplace_back(state.parameter.tensor.unsafeGetTensorImpl(),
                               state_of(*optimizer).make(read_state(state, source)));
  }
  return staged;
}

}  // namespace

CheckpointMetadata load_checkpoint(const fs::path& directory, torch::nn::Module& model,
                                   torch::optim::Optimizer* optimizer,
                                   const ParallelGroups& groups) {
  const at::NoGradGuard no_grad;
  auto& world = *groups.world;
  const auto text = read_index(directory, world);
  CheckpointIndex index;
  Staged staged;
  do_together(world, [&] {
    index = parse_index(text);
    staged = stage(directory, index, model, optimizer, groups);
  });
  for (const auto& copy : staged.tensors) copy.destination.copy_(copy.values);
  if (optimizer != nullptr) {
    optimizer->state().clear();
    for (auto& [parameter, state] : staged.states) optimizer->state()[parameter] = std::move(state);
  }
  return index.metadata;
}

CheckpointMetadata load_checkpoint(const fs::path& directory, torch::nn::Module& model,
                                   ParallelOptimizer& optimizer, const ParallelGroups& groups) {
  const at::NoGradGuard no_grad;
  const auto text = read_index(directory, *groups.world);
  CheckpointIndex index;
  std::vector<ParallelParameter> tensors;
  std::vector<torch::Tensor> parts;
  do_together(*groups.world, [&] {
    index = parse_index(text);
    check_optimizer(index, optimizer.name());
    tensors = with_state(model_tensors(model, groups), optimizer);
    TensorSource source(directory, index);
    check_names(tensors, index, source, /*with_optimizer=*/true);
    parts = read_parts(tensors, source);
  });
  put(parts, tensors);
  return index.metadata;
}

CheckpointDescription describe_checkpoint(const fs::path& directory, Communicator& world) {
  CheckpointDescription description{read_index(directory, world), {}, {}, {}};
  do_together(world, [&] {
    const auto index = parse_index(description.index);
    for (const auto& [name, stored] : index.tensors) description.names.push_back(name);
    description.optimizer = index.optimizer;
    description.metadata = index.metadata;
  });
  return description;
}

void load_checkpoint(const fs::path& directory, const std::string& index,
                     const std::vector<ParallelParameter>& tensors, bool with_optimizer,
                     const ParallelGroups& groups) {
  const at::NoGradGuard no_grad;
  std::vector<torch::Tensor> parts;
  do_together(*groups.world, [&] {
    const auto parsed = parse_index(index);
    TensorSource source(directory, parsed);
    for (const auto& tensor : tensors) check_placement(tensor, groups);
    check_names(tensors, parsed, source, with_optimizer);
    parts = read_parts(tensors, source);
  });
  put(parts, tensors);
}

}  // namespace anabranch
