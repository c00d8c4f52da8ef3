#pragma once

#include <functional>
#include <string>
#include <vector>

#include "support/random.h"

namespace anabranch::test {

/// Makes bytes that a parser may meet and should not trust: sound ones with a few changes each. Bits are
/// flipped, stretches cut, doubled, moved and overwritten, words of the format put in, some of them very
/// often, and two sound inputs are joined.
class Mutator {
 public:
  /// `words`: what has a meaning in the format. `max_bytes`: no input is longer.
  Mutator(uint64_t seed, std::vector<std::string> samples, std::vector<std::string> words,
          size_t max_bytes = 1 << 20);

  std::string next();

 private:
  void change(std::string& bytes);
  size_t place_in(const std::string& bytes);

  Random random_;
  std::vector<std::string> samples_;
  std::vector<std::string> words_;
  size_t max_bytes_;
};

/// Gives `parse` inputs for as long as ANABRANCH_TEST_FUZZ_SECONDS says (default: 2)
/// and returns how many. Each lies in `<name>.input` of the temporary folder while it is parsed: what
/// ended the process is there, and the seed of the run has been printed.
int64_t fuzz(const std::string& name, Mutator mutator,
             const std::function<void(const std::string& bytes)>& parse);

}  // namespace anabranch::test
