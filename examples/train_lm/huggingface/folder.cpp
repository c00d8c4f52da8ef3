#include "huggingface/folder.h"

#include <ATen/ATen.h>
#include <anabranch/expert_placement.h>
#include <anabranch/safetensors.h>

#include <cstdio>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "agreement.h"
#include "huggingface/names.h"
#include "huggingface/reader.h"
#include "replace_file.h"
#include "require.h"

namespace train_lm {
namespace {

namespace fs = std::filesystem;

/// Rows of heads: from halves to neighbours, or back.
torch::Tensor reordered(const torch::Tensor& rows, int64_t heads, bool to_neighbours) {
  if (heads == 0) return rows;
  const auto sizes = rows.sizes().vec();
  const int64_t width = sizes[0] / heads;
  const auto [first, second] =
      to_neighbours ? std::pair(int64_t{2}, width / 2) : std::pair(width / 2, int64_t{2});
  return rows.reshape({heads, first, second, -1}).transpose(1, 2).reshape(sizes);
}

/// A tensor of the model, or of one expert of it, and what it is in the folder.
struct Placed {
  torch::Tensor tensor;
  std::vector<HfTensor> parts;

  torch::Tensor part(const HfTensor& of) const {
    return of.rows == 0 ? tensor : tensor.narrow(0, of.first_row, of.rows);
  }
};

std::vector<anabranch::ParallelParameter> tensors_of(LanguageModel& model,
                                                     const anabranch::ParallelGroups& groups) {
  auto tensors = anabranch::parallel_parameters(*model, groups);
  for (const auto& buffer : model->named_buffers()) {
    tensors.push_back({buffer.key(), buffer.value()});
  }
  return tensors;
}

/// Those of this rank. A shared expert is one of a single expert, which has no number there.
std::vector<Placed> placed(const std::vector<anabranch::ParallelParameter>& tensors,
                           const HfFamily& family, const ModelOptions& options) {
  std::vector<Placed> all;
  for (const auto& of : tensors) {
    const auto values = of.tensor.detach();
    const bool is_shared = of.name.find(".shared_expert.") != std::string::npos;
    if (!of.is_expert) {
      all.push_back({is_shared ? values[0] : values, hf_tensors(family, options, of.name)});
    }
    for (int64_t local = 0; of.is_expert && local < values.size(0); ++local) {
      const auto parts = hf_tensors(family, options, of.name, of.held(local).expert);
      all.push_back({values[local], parts});
    }
  }
  return all;
}

/// What all ranks together have, by name.
std::set<std::string> all_names(const std::vector<anabranch::ParallelParameter>& tensors,
                                const HfFamily& family, const ModelOptions& options) {
  std::set<std::string> names;
  for (const auto& of : tensors) {
    for (int64_t expert = 0; expert < (of.is_expert ? of.num_experts : 1); ++expert) {
      for (const auto& part : hf_tensors(family, options, of.name, expert)) names.insert(part.name);
    }
  }
  return names;
}

void fill(const Placed& placed, HfReader& folder) {
  for (const auto& of : placed.parts) {
    const auto rows = placed.part(of);
    rows.copy_(reordered(folder.read(of.name, rows.sizes()), of.heads, /*to_neighbours=*/true));
  }
}

std::string file_name(int64_t number, int64_t count) {
  if (count == 1) return kHfFile;
  char text[64];
  std::snprintf(text, sizeof(text), "model-%05d-of-%05d.safetensors", static_cast<int>(number + 1),
                static_cast<int>(count));
  return text;
}

/// Which file has which tensor: an expert's its rank's, all else the first.
std::string index_of(const std::vector<anabranch::ParallelParameter>& tensors,
                     const HfFamily& family, const ModelOptions& options, int64_t files) {
  nlohmann::json weight_map = nlohmann::json::object();
  int64_t bytes = 0;
  for (const auto& of : tensors) {
    const auto placement = of.placement_over(files);
    const auto one =
        of.is_expert ? c10::multiply_integers(of.tensor.sizes().slice(1)) : of.tensor.numel();
    for (int64_t rank = 0; rank < files; ++rank) {
      const int64_t count = of.is_expert ? placement.local_experts(rank) : rank == 0;
      bytes += count * one * of.tensor.element_size();
      for (int64_t local = 0; local < count; ++local) {
        const int64_t expert = of.is_expert ? placement.at(rank, local).expert : 0;
        for (const auto& part : hf_tensors(family, options, of.name, expert)) {
          weight_map[part.name] = file_name(rank, files);
        }
      }
    }
  }
  return nlohmann::json{{"metadata", {{"total_size", bytes}}}, {"weight_map", weight_map}}.dump(2) +
         "\n";
}

}  // namespace

void load_hf(const fs::path& folder, LanguageModel& model, const ModelOptions& options,
             const anabranch::ParallelGroups& groups) {
  const torch::NoGradGuard no_grad;
  const auto tensors = tensors_of(model, groups);
  together(*groups.world, [&] {
    const auto family = hf_family(folder);
    HfReader files(folder);
    const auto expected = all_names(tensors, family, options);
    for (const auto& [name, file] : files.names()) {
      require(expected.contains(name), folder.string(), " has ", name, ", the model has not");
    }
    for (const auto& each : placed(tensors, family, options)) fill(each, files);
  });
}

void save_hf(const fs::path& folder, LanguageModel& model, const Options& options,
             const anabranch::ParallelGroups& groups) {
  const torch::NoGradGuard no_grad;
  auto& world = *groups.world;
  const int64_t files = groups.expert_parallel->size();
  const auto tensors = tensors_of(model, groups);
  HfFamily family;
  on_rank_zero(world, [&] {
    fs::create_directories(folder);
    for (const auto& entry : fs::directory_iterator(folder)) {
      require(entry.path().extension() != ".safetensors", "--save-hf: ", folder.string(),
              " has a model already");
    }
  });
  together(world, [&] {
    family = hf_family_of(options.model);
    if (world.rank() >= files) return;
    std::vector<anabranch::NamedTensor> named;
    for (const auto& of : tensors) {
      if (!of.is_expert && world.rank() > 0) continue;
      for (const auto& each : placed({of}, family, options.model)) {
        for (const auto& part : each.parts) {
          named.push_back({part.name, reordered(each.part(part), part.heads, false)});
        }
      }
    }
    if (named.empty()) return;
    anabranch::write_safetensors(folder / file_name(world.rank(), files), std::move(named));
  });
  on_rank_zero(world, [&] {
    if (files > 1) replace_file(folder / kHfIndex, index_of(tensors, family, options.model, files));
    replace_file(folder / "config.json",
                 hf_config(family, options.model, options.training.sequence_length));
  });
}

}  // namespace train_lm
