#include "support/mutations.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>

namespace anabranch::test {
namespace {

std::chrono::duration<double> fuzz_time() {
  const char* seconds = std::getenv("ANABRANCH_TEST_FUZZ_SECONDS");
  return std::chrono::duration<double>(seconds == nullptr ? 2.0 : std::atof(seconds));
}

}  // namespace

Mutator::Mutator(uint64_t seed, std::vector<std::string> samples, std::vector<std::string> words,
                 size_t max_bytes)
    : random_(seed),
      samples_(std::move(samples)),
      words_(std::move(words)),
      max_bytes_(max_bytes) {}

std::string Mutator::next() {
  std::string bytes = random_.pick(samples_);
  for (int64_t changes = random_.integer(1, 8); changes > 0; --changes) {
    change(bytes);
  }
  bytes.resize(std::min(bytes.size(), max_bytes_));
  return bytes;
}

size_t Mutator::place_in(const std::string& bytes) {
  return static_cast<size_t>(random_.integer(0, static_cast<int64_t>(bytes.size())));
}

void Mutator::change(std::string& bytes) {
  const size_t at = place_in(bytes);
  const auto length = static_cast<size_t>(random_.integer(0, random_.chance() ? 8 : 64));
  switch (random_.integer(0, 7)) {
    case 0:
      if (at < bytes.size())
        bytes[at] = static_cast<char>(bytes[at] ^ (1 << random_.integer(0, 7)));
      return;
    case 1:
      if (at < bytes.size()) bytes[at] = static_cast<char>(random_.integer(0, 255));
      return;
    case 2:
      bytes.erase(at, length);
      return;
    case 3:
      bytes.insert(place_in(bytes), bytes.substr(at, length));
      return;
    case 4:
      bytes.replace(at, length, random_.pick(words_));
      return;
    case 5:
      bytes.insert(at, random_.pick(words_));
      return;
    case 6: {
      if (!random_.chance(0.1)) return;
      const std::string word = random_.pick(words_);
      std::string many;
      for (int64_t times = random_.integer(1, 300'000); times > 0; --times) many += word;
      bytes.insert(at, many);
      return;
    }
    default: {
      const std::string other = random_.pick(samples_);
      bytes = bytes.substr(0, at) + other.substr(place_in(other));
    }
  }
}

int64_t fuzz(const std::string& name, Mutator mutator,
             const std::function<void(const std::string& bytes)>& parse) {
  const auto kept = std::filesystem::temp_directory_path() / (name + ".input");
  const auto end = std::chrono::steady_clock::now() + fuzz_time();
  int64_t count = 0;
  for (; std::chrono::steady_clock::now() < end; ++count) {
    const std::string bytes = mutator.next();
    std::ofstream(kept, std::ios::binary).write(bytes.data(), std::ssize(bytes));
    parse(bytes);
  }
  std::filesystem::remove(kept);
  return count;
}

}  // namespace anabranch::test
