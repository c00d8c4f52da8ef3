#include "metrics/events.h"

#include <c10/util/StringUtil.h>
#include <unistd.h>

#include <array>
#include <bit>
#include <chrono>
#include <nlohmann/json.hpp>

namespace train_lm {
namespace {

/// Of the Castagnoli polynomial, reflected.
constexpr std::array<uint32_t, 256> kCrcTable = [] {
  std::array<uint32_t, 256> table = {};
  for (uint32_t byte = 0; byte < table.size(); ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) {
      crc = (crc >> 1) ^ ((crc & 1) != 0 ? 0x82f63b78U : 0);
    }
    table[byte] = crc;
  }
  return table;
}();

uint32_t masked_crc(const std::string& data) {
  uint32_t crc = ~0U;
  for (const char byte : data) {
    crc = (crc >> 8) ^ kCrcTable[(crc ^ static_cast<unsigned char>(byte)) & 0xff];
  }
  return std::rotr(~crc, 15) + 0xa282ead8U;
}

/// The bytes of a number, on a machine that has the lowest first.
template <typename Number>
std::string bytes_of(Number number) {
  return {reinterpret_cast<const char*>(&number), sizeof number};
}
static_assert(std::endian::native == std::endian::little);

// Of Protocol Buffers' wire format: a field is its number and kind, then the value.
enum class Wire : uint8_t { kVarint = 0, kFixed64 = 1, kLength = 2, kFixed32 = 5 };

std::string varint(uint64_t value) {
  std::string text;
  for (; value >= 0x80; value >>= 7) {
    text.push_back(static_cast<char>(value | 0x80));
  }
  text.push_back(static_cast<char>(value));
  return text;
}

std::string key(uint64_t field, Wire wire) {
  return varint(field << 3 | static_cast<uint64_t>(wire));
}

std::string message(uint64_t field, const std::string& content) {
  return key(field, Wire::kLength) + varint(content.size()) + content;
}

/// `content`: its file_version (3), summary (5) or session_log (7).
std::string event(int64_t step, const std::string& content) {
  const std::chrono::duration<double> now = std::chrono::system_clock::now().time_since_epoch();
  return key(1, Wire::kFixed64) + bytes_of(now.count()) + key(2, Wire::kVarint) +
         varint(static_cast<uint64_t>(step)) + content;
}

/// A Summary's value: its tag (1) and simple_value (2).
std::string scalar(const std::string& tag, const nlohmann::json& number) {
  return message(1, message(1, tag) + key(2, Wire::kFixed32) + bytes_of(number.get<float>()));
}

std::string host_name() {
  std::array<char, 256> name = {};
  return gethostname(name.data(), name.size() - 1) == 0 ? name.data() : "host";
}

}  // namespace

EventFile::EventFile(const std::filesystem::path& folder, int64_t first_step) {
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(now).count();
  stream_.exceptions(std::ios::failbit | std::ios::badbit);
  stream_.open(folder / c10::str("events.out.tfevents.", seconds, ".", host_name(), ".", getpid()),
               std::ios::binary);
  write_record(event(0, message(3, "brain.Event:2")));
  // Its status (1) START (1).
  write_record(event(first_step, message(7, key(1, Wire::kVarint) + varint(1))));
}

void EventFile::write(const nlohmann::json& line) {
  std::string summary;
  for (const auto& [name, value] : line.items()) {
    if (value.is_number() && name != "step") {
      summary += scalar(name, value);
    } else if (value.is_structured()) {
      for (const auto& [part, number] : value.items()) {
        if (number.is_number()) {
          summary += scalar(name + '/' + part, number);
        }
      }
    }
  }
  write_record(event(line.at("step").get<int64_t>(), message(5, summary)));
}

void EventFile::write_record(const std::string& data) {
  const auto length = bytes_of(uint64_t{data.size()});
  stream_ << length << bytes_of(masked_crc(length)) << data << bytes_of(masked_crc(data))
          << std::flush;
}

}  // namespace train_lm
