#include "gemm/auto/engine_choices.h"

#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "gemm/auto/file_lock.h"
#include "gemm/auto/measuring.h"

namespace anabranch {
namespace {

using Choice = EngineChoices::Choice;

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

using Choices = std::map<Product, Choice>;

/// Throws nlohmann::json::exception for what is not of the form of `to_json`; products that are none are
/// left out.
Choices from_json(const std::string& text) {
  Choices choices;
  const auto all = nlohmann::json::parse(text);
  for (const auto& [name, choice] : all.items()) {
    Choice read = {choice.at("engine").get<std::string>(),
                   choice.at("milliseconds").get<EngineChoices::Times>()};
    if (const auto product = parse_product(name)) {
      choices[*product] = std::move(read);
    }
  }
  return choices;
}

std::string to_json(const Choices& choices) {
  nlohmann::json all = nlohmann::json::object();
  for (const auto& [product, choice] : choices) {
    all[to_string(product)] = {{"engine", choice.engine}, {"milliseconds", choice.milliseconds}};
  }
  return all.dump(1) + '\n';
}

}  // namespace

std::string engine_choices_file(torch::Device device) {
  return cache_folder() / c10::str("grouped_gemm-", kEngines, "-", machine_of(device), ".json");
}

EngineChoices::EngineChoices(std::string file, std::chrono::seconds patience)
    : file_(std::move(file)), patience_(patience) {
  choices_ = read();
}

std::optional<Choice> EngineChoices::find(const Product& product, const Able& able) const {
  const std::lock_guard lock(mutex_);
  const auto found = choices_.find(product);
  return found != choices_.end() && able(found->second.engine) ? std::optional(found->second)
                                                               : std::nullopt;
}

std::optional<Choice> EngineChoices::nearest(const Product& product, const Able& able) const {
  const std::lock_guard lock(mutex_);
  std::optional<Choice> best;
  double least = std::numeric_limits<double>::infinity();
  for (const auto& [other, choice] : choices_) {
    const double apart = distance(product, other);
    if (apart < least && able(choice.engine)) {
      least = apart;
      best = choice;
    }
  }
  return best;
}

std::map<std::string, double> EngineChoices::slowness(const Product& product, double within) const {
  const std::lock_guard lock(mutex_);
  std::map<std::string, std::pair<double, double>> nearest;  // distance, then multiple
  for (const auto& [other, choice] : choices_) {
    const double apart = distance(product, other);
    const auto best = std::min_element(
        choice.milliseconds.begin(), choice.milliseconds.end(),
        [](const auto& left, const auto& right) { return left.second < right.second; });
    for (const auto& [engine, milliseconds] : choice.milliseconds) {
      const auto known = nearest.find(engine);
      if (apart <= within && (known == nearest.end() || apart < known->second.first)) {
        nearest[engine] = {apart, milliseconds / best->second};
      }
    }
  }
  std::map<std::string, double> multiples;
  for (const auto& [engine, found] : nearest) {
    multiples[engine] = found.second;
  }
  return multiples;
}

Choice EngineChoices::keep(const Product& product, const Choice& choice, const Able& able) {
  const std::lock_guard lock(mutex_);
  Choice taken = choice;
  if (choice.complete && !file_.empty()) {
    std::error_code error;
    std::filesystem::create_directories(std::filesystem::path(file_).parent_path(), error);
    const FileLock file_lock(file_ + ".lock", patience_);
    if (file_lock.held()) {
      Choices all = read();
      const auto there = all.find(product);
      if (there != all.end() && able(there->second.engine)) {
        taken = there->second;
      } else {
        all[product] = choice;
        write(all);
      }
      choices_.merge(all);
    } else {
      TORCH_WARN_ONCE("the engine choices in ", file_,
                      " could not be locked, and are not added to");
    }
  }
  choices_[product] = taken;
  return taken;
}

std::string EngineChoices::explain() const {
  const std::lock_guard lock(mutex_);
  std::string text = file_.empty() ? "" : "choices kept in " + file_ + "\n";
  for (const auto& [product, choice] : choices_) {
    text += to_string(product) + ": " + choice.engine + " (";
    const char* separator = "";
    for (const auto& [engine, milliseconds] : choice.milliseconds) {
      text += c10::str(separator, engine, " ", milliseconds, " ms");
      separator = ", ";
    }
    text += choice.complete ? ")\n" : "; the others found no memory)\n";
  }
  return text;
}

std::string EngineChoices::text() const {
  const std::lock_guard lock(mutex_);
  return to_json(choices_);
}

void EngineChoices::add(const std::string& text) {
  const std::lock_guard lock(mutex_);
  if (text.empty()) {
    return;
  }
  try {
    Choices added = from_json(text);
    choices_.merge(added);
  } catch (const nlohmann::json::exception& error) {
    throw std::runtime_error(c10::str("these are no engine choices: ", error.what()));
  }
}

EngineChoices::Choices EngineChoices::read() const {
  std::ifstream file(file_);
  if (!file) {
    return {};
  }
  std::ostringstream text;
  text << file.rdbuf();
  try {
    return from_json(text.str());
  } catch (const nlohmann::json::exception& error) {
    TORCH_WARN_ONCE("the engine choices in ", file_, " are not used: ", error.what());
    return {};
  }
}

/// Whole or not at all: others may read meanwhile.
void EngineChoices::write(const Choices& choices) const {
  const std::string written = c10::str(file_, ".", getpid());
  std::ofstream file(written);
  file << to_json(choices);
  file.close();
  std::error_code error;
  if (file) {
    std::filesystem::rename(written, file_, error);
  }
  if (!file || error) {
    std::filesystem::remove(written, error);
    TORCH_WARN_ONCE("the engine choices could not be written to ", file_);
  }
}

}  // namespace anabranch
