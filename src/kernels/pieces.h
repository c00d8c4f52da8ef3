#pragma once

#include <array>
#include <cstdint>

namespace anabranch {

/// A rank's tokens may cross in pieces: a short first one, so that sending begins early, and a short
/// last one, so that little is left to do when all have come.
constexpr int64_t kPieces = 3;

/// The first token of each piece, and the number of all.
inline std::array<int64_t, kPieces + 1> piece_begins(int64_t tokens) {
  return {0, tokens / 4, tokens - tokens / 4, tokens};
}

}  // namespace anabranch
