#pragma once

#include <torch/types.h>

#include <filesystem>

namespace train_lm {

/// A file of tokens, mapped into memory: a stream of documents, each ended by the token that its
/// tokenizer has for that.
class TokenFile {
 public:
  /// Whether `file` is one, by its index beside it or its header.
  static bool is_one(const std::filesystem::path& file);

  /// Megatron's `NAME.bin` with `NAME.idx`, or llm.c's `NAME.bin`, whose header says what it is. Throws
  /// std::invalid_argument that names the file and what of it is wrong: it is not what its index or
  /// header says, is cut short, or holds no whole numbers.
  explicit TokenFile(const std::filesystem::path& file);

  int64_t size() const { return size_; }
  /// Documents that the index tells apart; 0: there is none.
  int64_t documents() const { return documents_; }
  /// Where the first document begins that begins in the last twentieth of the tokens; that twentieth,
  /// where there is none or no index tells.
  int64_t last_part() const { return last_part_; }
  const std::filesystem::path& path() const { return path_; }

  /// Tokens `first` to `first + count`.
  void copy(int64_t first, int64_t count, int64_t* out) const;
  /// The largest token; reads the whole file.
  int64_t largest() const;

 private:
  void read_llm_c();
  void read_megatron(const std::filesystem::path& index);

  std::filesystem::path path_;
  torch::Tensor bytes_;  // [file size] uint8, mapped
  torch::Dtype dtype_ = at::kByte;
  const uint8_t* tokens_ = nullptr;  // within bytes_
  int64_t size_ = 0;
  int64_t documents_ = 0;
  int64_t last_part_ = 0;
};

}  // namespace train_lm
