// One parser as libFuzzer calls it: ANABRANCH_FUZZ_TARGET names it.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "fuzz/targets.h"

namespace {

const anabranch::test::FuzzTarget& target() {
  static const auto named = anabranch::test::fuzz_target(ANABRANCH_FUZZ_TARGET);
  return named;
}

}  // namespace

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size);

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  target().take({reinterpret_cast<const char*>(data), size});
  return 0;
}

/// libFuzzer's own mutations, and now and then a sound input to start from, or a word of the format put in.
extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size,
                                          unsigned int seed) {
  std::minstd_rand random(seed);
  const auto pick = [&](const std::vector<std::string>& from) -> const std::string& {
    return from[random() % from.size()];
  };
  std::string bytes(reinterpret_cast<const char*>(data), size);
  if (size < 2 || random() % 64 == 0) {
    bytes = pick(target().samples);
  } else if (random() % 8 == 0) {
    bytes.insert(random() % (size + 1), pick(target().words));
  } else {
    return LLVMFuzzerMutate(data, size, max_size);
  }
  bytes.resize(std::min(bytes.size(), max_size));
  std::memcpy(data, bytes.data(), bytes.size());
  return bytes.size();
}
