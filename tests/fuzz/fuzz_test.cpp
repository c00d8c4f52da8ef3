// Each parser on inputs from a printed seed, for ANABRANCH_TEST_FUZZ_SECONDS.
#include <gtest/gtest.h>

#include "fuzz/targets.h"
#include "support/mutations.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

class Fuzzed : public ::testing::TestWithParam<std::string> {};

TEST_P(Fuzzed, EndsInItsOwnErrorOrIsSound) {
  const auto target = fuzz_target(GetParam());
  for (const auto& sample : target.samples) EXPECT_TRUE(target.take(sample));
  int64_t sound = 0;
  const int64_t count =
      fuzz(target.name, Mutator(test_seed(), target.samples, target.words),
           [&](const std::string& bytes) { sound += target.take(bytes) ? 1 : 0; });
  RecordProperty("inputs", std::to_string(count));
  EXPECT_GT(sound, 0);
  EXPECT_LT(sound, count);
}

INSTANTIATE_TEST_SUITE_P(Parsers, Fuzzed,
                         ::testing::Values("datagram", "safetensors", "index", "options"),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace anabranch::test
