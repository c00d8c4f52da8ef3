#pragma once

#include <c10/util/StringUtil.h>

#include <cstdint>
#include <limits>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>

namespace anabranch {

/// Deeper than anything that is ours.
inline constexpr int kMaxJsonDepth = 32;

/// The value that `text` holds. Throws std::invalid_argument for text that is no JSON, and for text that
/// nests deeper: copying, comparing and printing a value take as much of the stack as it is deep, so a file of
/// a million brackets would end the process.
inline nlohmann::json parse_json(const std::string& text) {
  const auto limit_depth = [](int depth, nlohmann::json::parse_event_t /*event*/,
                              nlohmann::json& /*parsed*/) {
    if (depth > kMaxJsonDepth) {
      throw std::invalid_argument(c10::str("nested deeper than ", kMaxJsonDepth, " levels"));
    }
    return true;
  };
  // The parser takes a zero for the text's end, and would not look at what comes behind it.
  const size_t zero = text.find('\0');
  if (zero != std::string::npos) {
    throw std::invalid_argument(c10::str("no JSON at byte ", zero + 1));
  }
  try {
    return nlohmann::json::parse(text, limit_depth);
  } catch (const nlohmann::json::parse_error& error) {
    // Its own words quote bytes of the text, which may be cut within a character.
    throw std::invalid_argument(c10::str("no JSON at byte ", error.byte));
  }
}

/// A whole number in [0, max]: JSON's own conversions would take -1, 1.5 or 1e300 for another.
inline int64_t json_size(const nlohmann::json& value,
                         int64_t max = std::numeric_limits<int64_t>::max()) {
  if (!value.is_number_unsigned() || value.get<uint64_t>() > static_cast<uint64_t>(max)) {
    throw std::invalid_argument(
        c10::str("expected a whole number from 0 to ", max, ", found ", value.dump()));
  }
  return value.get<int64_t>();
}

}  // namespace anabranch
