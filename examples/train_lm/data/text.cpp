#include <ATen/ATen.h>

#include <nlohmann/json.hpp>
#include <vector>

#include "data/data.h"
#include "data/random.h"
#include "require.h"

namespace train_lm {
namespace {

uint64_t fnv1a(const torch::Tensor& bytes) {
  const auto* data = bytes.const_data_ptr<uint8_t>();
  uint64_t hash = 0xcbf29ce484222325ULL;
  for (int64_t i = 0; i < bytes.numel(); ++i) {
    hash = (hash ^ data[i]) * 0x100000001b3ULL;
  }
  return hash;
}

/// Bytes of a file. A batch's sequences start anywhere in it, drawn anew in every step.
class Text : public TokenSource {
 public:
  Text(const torch::Tensor& bytes, int64_t sequence_length, uint64_t seed)
      : sequence_length_(sequence_length), seed_(seed), hash_(fnv1a(bytes)) {
    const int64_t held_out = bytes.size(0) / kHeldOutPart;
    training_ = bytes.narrow(0, 0, bytes.size(0) - held_out);
    validation_ = bytes.narrow(0, bytes.size(0) - held_out, held_out);
  }

  torch::Tensor training_windows(const BatchPosition& batch, const Share& share) const override {
    auto generator = make_generator(seed_, Stream::kBatch, static_cast<uint64_t>(batch.step));
    const torch::Tensor all =
        at::randint(training_.size(0) - sequence_length_, {batch.size}, generator, at::kLong);
    const auto* first = all.const_data_ptr<int64_t>() + share.first;
    return gather(training_, {first, first + share.count});
  }

  /// They lie evenly over the held-out text.
  torch::Tensor validation_windows(int64_t count, const Share& share) const override {
    const int64_t last_offset = validation_.size(0) - sequence_length_ - 1;
    std::vector<int64_t> offsets;
    for (int64_t i = share.first; i < share.first + share.count; ++i) {
      offsets.push_back(count > 1 ? last_offset * i / (count - 1) : 0);
    }
    return gather(validation_, offsets);
  }

  int64_t vocabulary() const override { return 256; }
  std::optional<double> bytes_per_token() const override { return 1; }
  nlohmann::json identity() const override { return {{"bytes", bytes()}, {"hash", hash_}}; }
  std::string summary() const override { return c10::str(bytes(), " bytes of text"); }

 private:
  int64_t bytes() const { return training_.size(0) + validation_.size(0); }

  /// The sequences of `text` that start at `offsets`, each with its next byte.
  torch::Tensor gather(const torch::Tensor& text, const std::vector<int64_t>& offsets) const {
    torch::Tensor windows =
        at::empty({static_cast<int64_t>(offsets.size()), sequence_length_ + 1}, at::kLong);
    for (size_t i = 0; i < offsets.size(); ++i) {
      windows[static_cast<int64_t>(i)].copy_(text.narrow(0, offsets[i], sequence_length_ + 1));
    }
    return windows;
  }

  int64_t sequence_length_;
  uint64_t seed_;
  uint64_t hash_;             // FNV-1a of the whole
  torch::Tensor training_;    // [bytes] uint8
  torch::Tensor validation_;  // [bytes] uint8
};

}  // namespace

std::unique_ptr<TokenSource> open_text(const std::filesystem::path& file, int64_t sequence_length,
                                       uint64_t seed) {
  std::error_code error;
  const auto size = static_cast<int64_t>(std::filesystem::file_size(file, error));
  require(!error, "--data ", file.string(), ": ", error.message());
  require(size / kHeldOutPart > sequence_length, "--data ", file.string(), " has ", size,
          " bytes; at --sequence-length ", sequence_length, " at least ",
          (sequence_length + 1) * kHeldOutPart, " are needed");
  const torch::Tensor bytes = at::from_file(file.string(), /*shared=*/false, size, at::kByte);
  return std::make_unique<Text>(bytes, sequence_length, seed);
}

}  // namespace train_lm
