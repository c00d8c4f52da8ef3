#pragma once

#include <torch/types.h>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>

namespace train_lm {

/// Of a text or token file the last part, one in so many, is held out.
inline constexpr int64_t kHeldOutPart = 20;

/// Which of a global batch's items are a rank's: contiguous, as evenly as they can be.
struct Share {
  int64_t first = 0;
  int64_t count = 0;
};
Share share_of(int64_t items, int64_t rank, int64_t ranks);

/// Where a step's global batch stands among all sequences that a run trains on.
struct BatchPosition {
  int64_t step = 0;   ///< counts from 1
  int64_t first = 0;  ///< sequences that earlier steps took; goes into the checkpoint
  int64_t size = 0;   ///< sequences of this batch, over all ranks
};

/// B sequences of S tokens; B may be 0.
struct Batch {
  torch::Tensor inputs;   ///< [B, S] int64
  torch::Tensor targets;  ///< [B, S] int64, the token after each input

  /// From windows [B, S + 1].
  static Batch of(const torch::Tensor& windows);
  Batch to(torch::Device device) const { return {inputs.to(device), targets.to(device)}; }
};

/// Sequences to train on and others that are held out, of a length fixed when it is opened. It holds
/// no state: which sequences a batch has depends on its position and the seed alone, so any number of
/// ranks reads the same global batches, and a resumed run goes on where it was. Threads may share it.
class TokenSource {
 public:
  TokenSource() = default;
  TokenSource(const TokenSource&) = delete;
  TokenSource& operator=(const TokenSource&) = delete;
  virtual ~TokenSource() = default;

  /// [share.count, S + 1] int64 on the CPU: sequences `share` of the batch.
  virtual torch::Tensor training_windows(const BatchPosition& batch, const Share& share) const = 0;
  /// The same of `count` held-out sequences, which do not change.
  virtual torch::Tensor validation_windows(int64_t count, const Share& share) const = 0;

  /// All tokens are less.
  virtual int64_t vocabulary() const = 0;
  /// Of the text, where that is known: what turns a loss per token into bits per byte.
  virtual std::optional<double> bytes_per_token() const = 0;
  /// What tells this data from other data; equal on all ranks that see the same.
  virtual nlohmann::json identity() const = 0;
  /// For people: "4356110 bytes of text".
  virtual std::string summary() const = 0;
};

/// `data`: token files (data/files.h), one or a directory of them; another file, whose bytes become the
/// tokens; or "synthetic:V", uniformly random tokens of a vocabulary of V. Throws std::invalid_argument if it cannot be read or a part of it is shorter than
/// a sequence and its next token.
std::unique_ptr<TokenSource> open_token_source(const std::filesystem::path& data,
                                               int64_t sequence_length, uint64_t seed);

/// One byte a token; the last twentieth of the file is held out.
std::unique_ptr<TokenSource> open_text(const std::filesystem::path& file, int64_t sequence_length,
                                       uint64_t seed);

/// A token file, or all (*.bin) of a directory in the order of their names. What tools/tokenize says of them
/// (NAME.json, or DIRECTORY/tokens.json) tells the vocabulary; without it, the largest token does, for
/// which all are read. Held out are the files with "_val_" in their names; where there are none, what
/// TokenFile::last_part() tells of each.
std::unique_ptr<TokenSource> open_token_files(const std::filesystem::path& data,
                                              int64_t sequence_length, uint64_t seed);
bool has_token_files(const std::filesystem::path& data);

/// Nothing to be learnt, for measurements of speed: no file is read.
std::unique_ptr<TokenSource> make_synthetic_source(int64_t vocabulary, int64_t sequence_length,
                                                   uint64_t seed);

}  // namespace train_lm
