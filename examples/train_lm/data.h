#pragma once

#include <torch/types.h>

#include <cstdint>
#include <filesystem>

namespace train_lm {

/// A text of bytes: its last twentieth is held out for validation.
struct Text {
  torch::Tensor training;    ///< [bytes] uint8
  torch::Tensor validation;  ///< [bytes] uint8
  uint64_t hash = 0;         ///< FNV-1a of the whole

  int64_t bytes() const { return training.size(0) + validation.size(0); }
};

/// Maps the file into memory. Throws std::invalid_argument if it cannot be read or if a part of it
/// is shorter than a sequence and its next byte.
Text load_text(const std::filesystem::path& file, int64_t sequence_length);

/// Which of a global batch's items are a rank's: contiguous, as evenly as they can be.
struct Share {
  int64_t first = 0;
  int64_t count = 0;
};
Share share_of(int64_t items, int64_t rank, int64_t ranks);

/// B sequences of S bytes; B may be 0.
struct Batch {
  torch::Tensor inputs;   ///< [B, S] int64
  torch::Tensor targets;  ///< [B, S] int64, the byte after each input

  Batch to(torch::Device device) const { return {inputs.to(device), targets.to(device)}; }
};

/// This share of the global batch of `step`, which depends on `seed` and `step` alone.
Batch training_batch(const Text& text, int64_t batch_size, int64_t sequence_length, uint64_t seed,
                     int64_t step, const Share& share);

/// Sequences `share` of `count` that lie evenly over the held-out text.
Batch validation_batch(const Text& text, int64_t count, int64_t sequence_length,
                       const Share& share);

}  // namespace train_lm
