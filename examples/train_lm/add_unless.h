#pragma once

#include <nlohmann/json.hpp>

namespace train_lm {

/// Says an option that is not as usual: so runs resume that began when there was no such option.
template <typename Value>
void add_unless(const Value& usual, const char* name, const Value& value, nlohmann::json& json) {
  if (value != usual) json[name] = value;
}

}  // namespace train_lm
