#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace anabranch {

using SipHashKey = std::array<uint64_t, 2>;

/// SipHash-2-4 (Aumasson and Bernstein, 2012): a hash of short messages that nobody can make, or make
/// another message for, without the key.
inline uint64_t siphash(const SipHashKey& key, const void* data, size_t bytes) {
  uint64_t v0 = 0x736f6d6570736575 ^ key[0];
  uint64_t v1 = 0x646f72616e646f6d ^ key[1];
  uint64_t v2 = 0x6c7967656e657261 ^ key[0];
  uint64_t v3 = 0x7465646279746573 ^ key[1];
  const auto rounds = [&](int count) {
    for (int i = 0; i < count; ++i) {
      v0 += v1;
      v2 += v3;
      v1 = std::rotl(v1, 13) ^ v0;
      v3 = std::rotl(v3, 16) ^ v2;
      v0 = std::rotl(v0, 32);
      v2 += v1;
      v0 += v3;
      v1 = std::rotl(v1, 17) ^ v2;
      v3 = std::rotl(v3, 21) ^ v0;
      v2 = std::rotl(v2, 32);
    }
  };
  const auto* next = static_cast<const unsigned char*>(data);
  const auto take = [&](uint64_t word) {
    v3 ^= word;
    rounds(2);
    v0 ^= word;
  };
  size_t left = bytes;
  for (; left >= sizeof(uint64_t); left -= sizeof(uint64_t), next += sizeof(uint64_t)) {
    uint64_t word = 0;  // of a little-endian machine, as all that CUDA runs on are
    std::memcpy(&word, next, sizeof(word));
    take(word);
  }
  uint64_t last = static_cast<uint64_t>(bytes) << 56;
  for (size_t i = 0; i < left; ++i) {
    last |= static_cast<uint64_t>(next[i]) << (8 * i);
  }
  take(last);
  v2 ^= 0xff;
  rounds(4);
  return v0 ^ v1 ^ v2 ^ v3;
}

}  // namespace anabranch
