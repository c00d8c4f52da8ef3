#include "communicator/nccl/datagram.h"

#include <algorithm>
#include <type_traits>

namespace anabranch {
namespace {

constexpr uint32_t kMagic = 0x32484241;  // "ABH2": other programs' datagrams end here

template <typename number_t>
void append(std::string& bytes, number_t value) {
  static_assert(std::is_integral_v<number_t>);
  bytes.append(reinterpret_cast<const char*>(&value), sizeof(value));
}

/// Reads one field after another; what is not there is 0, and remembered.
class Reader {
 public:
  Reader(const std::string& bytes, size_t end) : bytes_(bytes), end_(end) {}

  template <typename number_t>
  number_t number() {
    number_t value = 0;
    const std::string part = text(sizeof(value));
    if (part.size() == sizeof(value)) {
      std::memcpy(&value, part.data(), sizeof(value));
    }
    return value;
  }
  std::string text(size_t length) {
    if (length > end_ - next_) {
      complete_ = false;
      return {};
    }
    next_ += length;
    return bytes_.substr(next_ - length, length);
  }
  /// All that was asked for was there, and nothing is left.
  bool is_done() const { return complete_ && next_ == end_; }

 private:
  const std::string& bytes_;
  size_t end_;
  size_t next_ = 0;
  bool complete_ = true;
};

}  // namespace

std::string encode(const HeartbeatDatagram& datagram, const SipHashKey& key) {
  std::string bytes;
  append(bytes, kMagic);
  append(bytes, static_cast<int32_t>(datagram.rank));
  append(bytes, datagram.number);
  append(bytes, datagram.started);
  append(bytes, datagram.ended);
  if (datagram.failure.has_value()) {
    const auto& [text, culprits] = *datagram.failure;
    const size_t named = std::min(culprits.size(), HeartbeatDatagram::kMostCulprits);
    const size_t told = std::min(text.size(), HeartbeatDatagram::kMostText);
    append(bytes, static_cast<uint16_t>(named));
    append(bytes, static_cast<uint16_t>(told));
    for (size_t i = 0; i < named; ++i) {
      append(bytes, static_cast<int32_t>(culprits[i]));
    }
    bytes.append(text, 0, told);
  }
  append(bytes, siphash(key, bytes.data(), bytes.size()));
  return bytes;
}

std::optional<HeartbeatDatagram> decode(const std::string& bytes, const SipHashKey& key, int size) {
  uint64_t signature = 0;
  if (bytes.size() < sizeof(signature) || bytes.size() > HeartbeatDatagram::kMostBytes) {
    return std::nullopt;
  }
  const size_t end = bytes.size() - sizeof(signature);
  std::memcpy(&signature, bytes.data() + end, sizeof(signature));
  if (signature != siphash(key, bytes.data(), end)) {
    return std::nullopt;
  }
  Reader reader(bytes, end);
  const bool known = reader.number<uint32_t>() == kMagic;
  HeartbeatDatagram datagram;
  const auto is_rank = [&](int32_t rank) { return rank >= 0 && rank < size; };
  datagram.rank = reader.number<int32_t>();
  datagram.number = reader.number<uint64_t>();
  datagram.started = reader.number<int64_t>();
  datagram.ended = reader.number<int64_t>();
  bool sound =
      known && is_rank(datagram.rank) && datagram.ended >= 0 && datagram.ended <= datagram.started;
  if (sound && !reader.is_done()) {
    const size_t named = reader.number<uint16_t>();
    const size_t told = reader.number<uint16_t>();
    sound = named <= HeartbeatDatagram::kMostCulprits && told <= HeartbeatDatagram::kMostText;
    NcclFailure& failure = datagram.failure.emplace();
    for (size_t i = 0; sound && i < named; ++i) {
      failure.culprits.push_back(reader.number<int32_t>());
      sound = is_rank(failure.culprits.back());
    }
    if (sound) {
      failure.text = reader.text(told);
    }
  }
  return sound && reader.is_done() ? std::optional(datagram) : std::nullopt;
}

}  // namespace anabranch
