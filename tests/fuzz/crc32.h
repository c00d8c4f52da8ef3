#pragma once

#include <algorithm>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>

namespace anabranch::test {

/// CRC-32 from its definition, bit by bit.
inline uint32_t crc32_of(const std::string& text) {
  uint32_t state = 0xffffffffu;
  for (const unsigned char byte : text) {
    state ^= byte;
    for (int bit = 0; bit < 8; ++bit) state = (state >> 1) ^ (state & 1 ? 0xedb88320u : 0);
  }
  return ~state;
}

/// A checkpoint's index with the checksum that belongs to it, where it is JSON of a depth that this can
/// handle.
inline std::string with_checksum(const std::string& text) {
  if (std::count(text.begin(), text.end(), '{') + std::count(text.begin(), text.end(), '[') >
      1000) {
    return text;
  }
  auto json = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) return text;
  json.erase("index_crc32");
  json["index_crc32"] = crc32_of(json.dump());
  return json.dump();
}

}  // namespace anabranch::test
