#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "communicator/nccl/siphash.h"

namespace anabranch {

/// Why a group of NCCL's has ended, and through which of its ranks.
struct NcclFailure {
  std::string text;
  std::vector<int> culprits;
};

/// What a rank tells the others of its group beside the data.
struct HeartbeatDatagram {
  static constexpr size_t kMostCulprits = 64;
  static constexpr size_t kMostText = 767;
  /// Of an encoded one.
  static constexpr size_t kMostBytes = 1100;

  int rank = 0;
  uint64_t number = 0;  ///< of those that the rank has sent: it only grows, so old ones are known
  int64_t started = 0;  ///< collectives that it has begun
  int64_t ended = 0;    ///< of these, those that it has seen end
  std::optional<NcclFailure> failure = {};
};

/// Signed with the group's key. Of a failure the first culprits and bytes of text that there is room for.
std::string encode(const HeartbeatDatagram& datagram, const SipHashKey& key);
/// Nothing, unless `bytes` are a datagram that was signed with `key`, and all its fields are such as one of
/// `size` ranks may have.
std::optional<HeartbeatDatagram> decode(const std::string& bytes, const SipHashKey& key, int size);

}  // namespace anabranch
