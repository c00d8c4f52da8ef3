#include <ATen/ATen.h>

#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>
#include <utility>
#include <vector>

#include "data/data.h"
#include "data/files.h"
#include "data/order.h"
#include "data/random.h"
#include "require.h"

namespace train_lm {
namespace {

/// A part of a file.
struct Piece {
  const TokenFile* file;
  int64_t first;
  int64_t count;
};

/// Pieces end to end.
class TokenStream {
 public:
  void append(const Piece& piece) {
    if (piece.count == 0) {
      return;
    }
    begins_.push_back(size_);
    pieces_.push_back(piece);
    size_ += piece.count;
  }
  int64_t size() const { return size_; }

  /// [count] at `first`. Throws std::runtime_error for a token that is not below `vocabulary`.
  void copy(int64_t first, int64_t count, int64_t vocabulary, int64_t* out) const {
    auto at = std::upper_bound(begins_.begin(), begins_.end(), first) - begins_.begin() - 1;
    for (; count > 0; ++at) {
      const Piece& piece = pieces_[static_cast<size_t>(at)];
      const int64_t skipped = first - begins_[static_cast<size_t>(at)];
      const int64_t taken = std::min(count, piece.count - skipped);
      piece.file->copy(piece.first + skipped, taken, out);
      check(out, taken, vocabulary, piece.file->path());
      out += taken, first += taken, count -= taken;
    }
  }

 private:
  static void check(const int64_t* tokens, int64_t count, int64_t vocabulary,
                    const std::filesystem::path& file) {
    const auto* wrong = std::find_if(
        tokens, tokens + count, [&](int64_t token) { return token < 0 || token >= vocabulary; });
    if (wrong != tokens + count) {
      throw std::runtime_error(c10::str("--data ", file.string(), " holds token ", *wrong,
                                        "; its vocabulary has ", vocabulary));
    }
  }

  std::vector<Piece> pieces_;
  std::vector<int64_t> begins_;  // of each piece within the stream
  int64_t size_ = 0;
};

/// What tools/tokenize says of its files, or {}.
nlohmann::json description_of(const std::filesystem::path& data) {
  auto file = data;
  if (std::filesystem::is_directory(data)) {
    file /= "tokens.json";
  } else {
    file.replace_extension(".json");
  }
  std::ifstream stream(file);
  if (!stream) {
    return nlohmann::json::object();
  }
  auto json = nlohmann::json::parse(stream, nullptr, /*allow_exceptions=*/false);
  require(json.is_object() && json.value("vocabulary", nlohmann::json()).is_number_integer() &&
              json["vocabulary"] > 0,
          "--data: ", file.string(), " names no vocabulary");
  return json;
}

std::optional<double> bytes_per_token_of(const nlohmann::json& description) {
  const auto found = description.find("bytes_per_token");
  return found != description.end() && found->is_number() && *found > 0
             ? std::optional(found->get<double>())
             : std::nullopt;
}

bool is_held_out(const TokenFile& file) {
  return file.path().filename().string().find("_val_") != std::string::npos;
}

/// Sequences of the documents one after another: sequence i of an epoch begins where sequence i − 1 ends,
/// the first at a place of its own in every epoch. Epochs have them in an order of their own, too.
class TokenFiles : public TokenSource {
 public:
  TokenFiles(std::vector<std::unique_ptr<TokenFile>> files, const nlohmann::json& description,
             int64_t sequence_length, uint64_t seed)
      : files_(std::move(files)), sequence_length_(sequence_length), seed_(seed) {
    split();
    vocabulary_ = description.value("vocabulary", int64_t{0});
    bytes_per_token_ = bytes_per_token_of(description);
    if (description.empty()) {
      for (const auto& file : files_) {
        vocabulary_ = std::max(vocabulary_, file->largest() + 1);
      }
    }
    // One is lost to the place where an epoch begins.
    sequences_ = training_.size() / sequence_length - 1;
    const auto enough = [&](const TokenStream& stream, int64_t least, const char* what) {
      require(stream.size() >= least, "--data ", files_[0]->path().string(), ": ", stream.size(),
              what, "; at --sequence-length ", sequence_length, " at least ", least, " are needed");
    };
    enough(training_, 2 * sequence_length, " tokens to train on");
    enough(validation_, sequence_length + 1, " tokens are held out");
    hash_ = hash();
  }

  torch::Tensor training_windows(const BatchPosition& batch, const Share& share) const override {
    torch::Tensor windows = at::empty({share.count, sequence_length_ + 1}, at::kLong);
    for (int64_t i = 0; i < share.count; ++i) {
      const int64_t number = batch.first + share.first + i;
      const auto epoch = static_cast<uint64_t>(number / sequences_);
      const int64_t index = Shuffle(sequences_, seed_, epoch)(number % sequences_);
      const auto begin =
          mixed_seed(seed_, Stream::kEpoch, epoch) % static_cast<uint64_t>(sequence_length_);
      copy(training_, static_cast<int64_t>(begin) + index * sequence_length_, windows[i]);
    }
    return windows;
  }

  /// They lie evenly over the held-out tokens.
  torch::Tensor validation_windows(int64_t count, const Share& share) const override {
    const int64_t last = validation_.size() - sequence_length_ - 1;
    torch::Tensor windows = at::empty({share.count, sequence_length_ + 1}, at::kLong);
    for (int64_t i = 0; i < share.count; ++i) {
      copy(validation_, count > 1 ? last * (share.first + i) / (count - 1) : 0, windows[i]);
    }
    return windows;
  }

  int64_t vocabulary() const override { return vocabulary_; }
  std::optional<double> bytes_per_token() const override { return bytes_per_token_; }

  nlohmann::json identity() const override {
    return {{"tokens", training_.size()},
            {"held-out", validation_.size()},
            {"vocabulary", vocabulary_},
            {"hash", hash_}};
  }

  std::string summary() const override {
    int64_t documents = 0;
    for (const auto& file : files_) {
      documents += file->documents();
    }
    auto text = c10::str(training_.size(), " tokens and ", validation_.size(),
                         " held out, of a vocabulary of ", vocabulary_);
    return documents > 0 ? c10::str(text, ", in ", documents, " documents") : text;
  }

 private:
  /// Files named so are held out; where there are none, the last twentieth is.
  void split() {
    const bool named = std::any_of(files_.begin(), files_.end(),
                                   [](const auto& file) { return is_held_out(*file); });
    for (const auto& file : files_) {
      const int64_t last_part = named ? (is_held_out(*file) ? 0 : file->size()) : file->last_part();
      training_.append({file.get(), 0, last_part});
      validation_.append({file.get(), last_part, file->size() - last_part});
    }
  }

  void copy(const TokenStream& stream, int64_t first, const torch::Tensor& window) const {
    stream.copy(first, sequence_length_ + 1, vocabulary_, window.mutable_data_ptr<int64_t>());
  }

  /// Of about 1,024 tokens that lie evenly over the training part: files may be larger than memory.
  uint64_t hash() const {
    uint64_t hash = 0;
    const int64_t stride = std::max<int64_t>(training_.size() / 1024, 1);
    for (int64_t place = 0; place < training_.size(); place += stride) {
      int64_t token = 0;
      training_.copy(place, 1, vocabulary_, &token);
      hash = mixed_bits(hash ^ static_cast<uint64_t>(token));
    }
    return hash;
  }

  std::vector<std::unique_ptr<TokenFile>> files_;
  int64_t sequence_length_;
  uint64_t seed_;
  TokenStream training_, validation_;
  int64_t sequences_ = 0;  // of an epoch
  int64_t vocabulary_ = 0;
  uint64_t hash_ = 0;
  std::optional<double> bytes_per_token_;
};

}  // namespace

bool has_token_files(const std::filesystem::path& data) {
  return std::filesystem::is_directory(data) || TokenFile::is_one(data);
}

std::unique_ptr<TokenSource> open_token_files(const std::filesystem::path& data,
                                              int64_t sequence_length, uint64_t seed) {
  std::vector<std::filesystem::path> names = {data};
  if (std::filesystem::is_directory(data)) {
    names.clear();
    for (const auto& entry : std::filesystem::directory_iterator(data)) {
      if (entry.path().extension() == ".bin") {
        names.push_back(entry.path());
      }
    }
    std::sort(names.begin(), names.end());
    require(!names.empty(), "--data ", data.string(),
            " is a directory without token files (*.bin)");
  }
  std::vector<std::unique_ptr<TokenFile>> files;
  for (const auto& name : names) {
    files.push_back(std::make_unique<TokenFile>(name));
  }
  return std::make_unique<TokenFiles>(std::move(files), description_of(data), sequence_length,
                                      seed);
}

}  // namespace train_lm
