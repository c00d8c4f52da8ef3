#include "gemm/auto/engine_choices.h"

#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <utility>

#include "gemm/auto/measuring.h"

namespace anabranch {
namespace {

/// To be raised whenever an engine comes, goes or becomes faster: older choices are then forgotten.
constexpr int kEngines = 4;

std::filesystem::path cache_folder() {
  if (const char* named = std::getenv("ANABRANCH_CACHE_DIR")) {
    return named;
  }
  if (const char* caches = std::getenv("XDG_CACHE_HOME")) {
    return std::filesystem::path(caches) / "anabranch";
  }
  const char* home = std::getenv("HOME");
  return std::filesystem::path(home == nullptr ? "." : home) / ".cache" / "anabranch";
}

/// What the times depend on, as the name of a file.
std::string machine_of(torch::Device device) {
  std::string name = device.is_cuda() ? describe_gpu(device) : "cpu";
  std::replace_if(
      name.begin(), name.end(), [](unsigned char c) { return !std::isalnum(c) && c != '.'; }, '-');
  return name;
}

}  // namespace

std::string engine_choices_file(torch::Device device) {
  return cache_folder() / c10::str("grouped_gemm-", kEngines, "-", machine_of(device), ".json");
}

EngineChoices::EngineChoices(std::string file) : file_(std::move(file)) { read(); }

std::optional<EngineChoices::Choice> EngineChoices::find(const std::string& product) const {
  const std::lock_guard lock(mutex_);
  const auto found = choices_.find(product);
  return found == choices_.end() ? std::nullopt : std::optional(found->second);
}

void EngineChoices::keep(const std::string& product, const Choice& choice) {
  const std::lock_guard lock(mutex_);
  choices_[product] = choice;
  write();
}

std::string EngineChoices::explain() const {
  const std::lock_guard lock(mutex_);
  std::string text = "choices kept in " + file_ + "\n";
  for (const auto& [product, choice] : choices_) {
    text += product + ": " + choice.engine + " (";
    const char* separator = "";
    for (const auto& [engine, milliseconds] : choice.milliseconds) {
      text += c10::str(separator, engine, " ", milliseconds, " ms");
      separator = ", ";
    }
    text += choice.complete ? ")\n" : "; the others found no memory)\n";
  }
  return text;
}

void EngineChoices::read() {
  std::ifstream file(file_);
  if (!file) {
    return;
  }
  try {
    const auto kept = nlohmann::json::parse(file);
    for (const auto& [product, choice] : kept.items()) {
      choices_[product] = {choice.at("engine").get<std::string>(),
                           choice.at("milliseconds").get<Times>()};
    }
  } catch (const nlohmann::json::exception& error) {
    TORCH_WARN_ONCE("the engine choices in ", file_, " are not used: ", error.what());
    choices_.clear();
  }
}

/// Whole or not at all: several processes may write at once.
void EngineChoices::write() const {
  nlohmann::json kept = nlohmann::json::object();
  for (const auto& [product, choice] : choices_) {
    if (choice.complete) {
      kept[product] = {{"engine", choice.engine}, {"milliseconds", choice.milliseconds}};
    }
  }
  std::error_code error;
  std::filesystem::create_directories(std::filesystem::path(file_).parent_path(), error);
  const std::string written = c10::str(file_, ".", getpid());
  std::ofstream file(written);
  file << kept.dump(1) << '\n';
  file.close();
  if (file) {
    std::filesystem::rename(written, file_, error);
  }
  if (!file || error) {
    TORCH_WARN_ONCE("the engine choices could not be written to ", file_);
  }
}

}  // namespace anabranch
