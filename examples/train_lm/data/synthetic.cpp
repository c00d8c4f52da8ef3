#include <ATen/ATen.h>

#include <nlohmann/json.hpp>

#include "data/data.h"
#include "data/random.h"

namespace train_lm {
namespace {

/// A token depends on the seed, its sequence's number and its place in it alone.
class SyntheticTokens : public TokenSource {
 public:
  SyntheticTokens(int64_t vocabulary, int64_t sequence_length, uint64_t seed)
      : vocabulary_(vocabulary), sequence_length_(sequence_length), seed_(seed) {}

  torch::Tensor training_windows(const BatchPosition& batch, const Share& share) const override {
    return draw(Stream::kBatch, batch.first + share.first, share.count);
  }
  torch::Tensor validation_windows(int64_t /*count*/, const Share& share) const override {
    return draw(Stream::kHeldOut, share.first, share.count);
  }

  int64_t vocabulary() const override { return vocabulary_; }
  std::optional<double> bytes_per_token() const override { return std::nullopt; }
  nlohmann::json identity() const override { return {{"synthetic", vocabulary_}}; }
  std::string summary() const override {
    return c10::str("random tokens of a vocabulary of ", vocabulary_);
  }

 private:
  /// Sequences `first` to `first + count` of `stream`.
  torch::Tensor draw(Stream stream, int64_t first, int64_t count) const {
    const auto size = static_cast<uint64_t>(vocabulary_);
    torch::Tensor windows = at::empty({count, sequence_length_ + 1}, at::kLong);
    auto* out = windows.mutable_data_ptr<int64_t>();
    for (int64_t i = 0; i < count; ++i) {
      const uint64_t start = mixed_seed(seed_, stream, static_cast<uint64_t>(first + i));
      for (uint64_t place = 0; place <= static_cast<uint64_t>(sequence_length_); ++place) {
        *out++ = static_cast<int64_t>(mixed_bits(start + place) % size);
      }
    }
    return windows;
  }

  int64_t vocabulary_;
  int64_t sequence_length_;
  uint64_t seed_;
};

}  // namespace

std::unique_ptr<TokenSource> make_synthetic_source(int64_t vocabulary, int64_t sequence_length,
                                                   uint64_t seed) {
  return std::make_unique<SyntheticTokens>(vocabulary, sequence_length, seed);
}

}  // namespace train_lm
