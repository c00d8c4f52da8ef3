#pragma once

#include <nlohmann/json.hpp>
#include <utility>

#include "require.h"

namespace train_lm {

/// The keys of a config.json, read into a model's options or written from them: each family lists its keys
/// once, for both.
class Keys {
 public:
  static Keys reading(nlohmann::json config) { return {std::move(config), false}; }
  static Keys writing() { return {nlohmann::json::object(), true}; }

  bool is_writing() const { return writing_; }
  const nlohmann::json& config() const { return config_; }

  template <typename Value>
  void value(const char* key, Value& value) {
    if (writing_) {
      config_[key] = value;
      return;
    }
    require(has(key), "config.json has no ", key);
    try {
      config_.at(key).get_to(value);
    } catch (const nlohmann::json::exception& error) {
      throw std::invalid_argument(c10::str("config.json: ", key, ": ", error.what()));
    }
  }

  /// Of which a checkpoint may say nothing.
  template <typename Value>
  void value(const char* key, Value& value, const Value& absent) {
    if (!writing_ && !has(key)) {
      value = absent;
    } else {
      this->value(key, value);
    }
  }

  /// What a model here has in one way alone.
  void only(const char* key, const nlohmann::json& expected, const char* why) {
    if (writing_) {
      config_[key] = expected;
      return;
    }
    require(!has(key) || config_.at(key) == expected, "config.json: ", key, " = ",
            config_.value(key, nlohmann::json()).dump(), ", expected ", expected.dump(), ": ", why);
  }

  bool has(const char* key) const { return config_.contains(key) && !config_.at(key).is_null(); }

 private:
  Keys(nlohmann::json config, bool writing) : config_(std::move(config)), writing_(writing) {}

  nlohmann::json config_;
  bool writing_;
};

}  // namespace train_lm
