#include "run_directory.h"

#include <anabranch/error.h>

#include <charconv>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>

#include "agreement.h"
#include "replace_file.h"
#include "require.h"

namespace train_lm {
namespace {

nlohmann::json describe(const Options& options, const TokenSource& data) {
  return {{"model", options.model}, {"training", options.training}, {"data", data.identity()}};
}

/// "--name 2 (now 3)" for each entry that is not equal in both; what one of them does not say is null.
std::vector<std::string> differences(const nlohmann::json& before, const nlohmann::json& now,
                                     const std::string& prefix) {
  std::set<std::string> names;
  for (const auto* all : {&before, &now}) {
    for (const auto& [name, value] : all->items()) names.insert(name);
  }
  std::vector<std::string> result;
  for (const auto& name : names) {
    const auto value_in = [&name](const nlohmann::json& all) {
      return all.is_object() ? all.value(name, nlohmann::json()) : all;
    };
    const auto earlier = value_in(before), later = value_in(now);
    if (earlier != later) {
      result.push_back(c10::str(prefix, name, " ", earlier.dump(), " (now ", later.dump(), ")"));
    }
  }
  return result;
}

/// Null where the text is no JSON, or nests deeper than ours does: copying and printing a value takes as
/// much of the stack as it is deep.
nlohmann::json parse_description(std::istream& text) {
  constexpr int kMaxDepth = 8;
  bool too_deep = false;
  const auto limit = [&](int depth, nlohmann::json::parse_event_t, nlohmann::json&) {
    too_deep = too_deep || depth > kMaxDepth;
    return !too_deep;
  };
  auto json = nlohmann::json::parse(text, limit, /*allow_exceptions=*/false);
  return too_deep ? nlohmann::json() : json;
}

template <typename Number>
Number number_of(const anabranch::CheckpointMetadata& metadata, const std::string& name) {
  Number number = {};
  const auto found = metadata.find(name);
  if (found != metadata.end()) {
    const auto& text = found->second;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
    if (error == std::errc() && end == text.data() + text.size()) {
      return number;
    }
  }
  throw Refusal("the checkpoint's metadata holds no number for '" + name + "'");
}

}  // namespace

void RunDirectory::write_description() const {
  replace_file(description(), describe(options_, data_).dump(2) + '\n');
}

void RunDirectory::begin(anabranch::Communicator& world) const {
  on_rank_zero(world, [&] {
    std::filesystem::create_directories(options_.output);
    if (std::filesystem::exists(checkpoint())) {
      const auto previous = options_.output / "checkpoint.previous";
      std::filesystem::remove_all(previous);
      std::filesystem::rename(checkpoint(), previous);
    }
    write_description();
  });
}

std::vector<std::string> RunDirectory::compare_with_description() const {
  require(std::filesystem::is_regular_file(description()) && std::filesystem::exists(checkpoint()),
          "--resume: ", options_.output.string(), " holds no checkpoint");
  std::ifstream file(description());
  const auto before = parse_description(file);
  require(before.is_object(), "--resume: ", description().string(), " is damaged");
  const auto now = describe(options_, data_);
  const auto other_model = differences(before.value("model", nlohmann::json()), now["model"], "--");
  require(other_model.empty(), "--resume: the checkpoint in ", options_.output.string(),
          " is of another model: ", c10::Join(", ", other_model));
  auto notes = differences(before.value("training", nlohmann::json()), now["training"], "--");
  for (auto& note : differences(before.value("data", nlohmann::json()), now["data"], "data ")) {
    notes.push_back(std::move(note));
  }
  return notes;
}

RunState RunDirectory::resume(torch::nn::Module& model, anabranch::ParallelOptimizer& optimizer,
                              const anabranch::ParallelGroups& groups,
                              std::vector<std::string>& notes) const {
  on_rank_zero(*groups.world, [&] { notes = compare_with_description(); });
  RunState state;
  try {
    const auto metadata = anabranch::load_checkpoint(checkpoint(), model, optimizer, groups);
    state.step = number_of<int64_t>(metadata, "step");
    state.sequences = number_of<int64_t>(metadata, "sequences");
    state.seconds = number_of<double>(metadata, "seconds");
  } catch (const anabranch::CheckpointError& error) {
    // The same on every rank.
    throw Refusal(c10::str("--resume: ", error.what()));
  }
  on_rank_zero(*groups.world, [&] { write_description(); });
  return state;
}

anabranch::CheckpointMetadata RunDirectory::metadata_of(const RunState& state) const {
  return {{"step", std::to_string(state.step)},
          {"sequences", std::to_string(state.sequences)},
          {"seconds", std::to_string(state.seconds)},
          {"options", describe(options_, data_).dump()}};
}

void RunDirectory::save(const RunState& state, const torch::nn::Module& model,
                        const anabranch::ParallelOptimizer& optimizer,
                        const anabranch::ParallelGroups& groups) const {
  anabranch::save_checkpoint(checkpoint(), model, optimizer, metadata_of(state), groups);
}

std::unique_ptr<anabranch::BackgroundSave> RunDirectory::begin_save(
    const RunState& state, const torch::nn::Module& model,
    const anabranch::ParallelOptimizer& optimizer, const anabranch::ParallelGroups& groups) const {
  return std::make_unique<anabranch::BackgroundSave>(checkpoint(), model, optimizer,
                                                     metadata_of(state), groups);
}

}  // namespace train_lm
