#include "data/data.h"

#include <algorithm>
#include <charconv>

#include "require.h"

namespace train_lm {
namespace {

constexpr std::string_view kSynthetic = "synthetic:";

int64_t vocabulary_of(std::string_view text) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  require(error == std::errc() && end == text.data() + text.size() && value > 0, "--data ",
          kSynthetic, text, ": expected the size of a vocabulary after the colon");
  return value;
}

}  // namespace

Share share_of(int64_t items, int64_t rank, int64_t ranks) {
  const int64_t rest = items % ranks;
  return {rank * (items / ranks) + std::min(rank, rest), items / ranks + (rank < rest ? 1 : 0)};
}

Batch Batch::of(const torch::Tensor& windows) {
  const int64_t length = windows.size(1) - 1;
  return {windows.narrow(1, 0, length).contiguous(), windows.narrow(1, 1, length).contiguous()};
}

std::unique_ptr<TokenSource> open_token_source(const std::filesystem::path& data,
                                               int64_t sequence_length, uint64_t seed) {
  if (data.native().starts_with(kSynthetic)) {
    const auto vocabulary =
        vocabulary_of(std::string_view(data.native()).substr(kSynthetic.size()));
    return make_synthetic_source(vocabulary, sequence_length, seed);
  }
  if (has_token_files(data)) {
    return open_token_files(data, sequence_length, seed);
  }
  return open_text(data, sequence_length, seed);
}

}  // namespace train_lm
