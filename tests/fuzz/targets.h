#pragma once

#include <functional>
#include <string>
#include <vector>

namespace anabranch::test {

/// A parser of bytes that others may have made. Needs nothing of the library but that parser.
struct FuzzTarget {
  std::string name;
  std::vector<std::string> samples;  ///< sound ones
  std::vector<std::string> words;    ///< what has a meaning in the format
  /// Whether these bytes are sound. Throws where the parser has failed: with any other error than its own, or
  /// std::logic_error for what it has taken for something that it is not.
  std::function<bool(const std::string& bytes)> take;
};

/// "datagram", "safetensors", "index", "options"
std::vector<FuzzTarget> fuzz_targets();
/// Throws std::out_of_range if there is none of that name.
FuzzTarget fuzz_target(const std::string& name);

}  // namespace anabranch::test
