#include "data/files.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <optional>

#include "data/data.h"
#include "require.h"

namespace train_lm {
namespace {

// llm.c: 256 numbers of 32 bits, then the tokens.
constexpr int64_t kHeaderNumbers = 256;
struct LlmCFormat {
  int32_t magic, version;
  torch::Dtype dtype;
};
constexpr std::array kLlmCFormats = {LlmCFormat{20240520, 1, at::kUInt16},   // GPT-2's tokens
                                     LlmCFormat{20240801, 7, at::kUInt32}};  // Llama 3's

// Megatron's index: 9 bytes, version (64 bits), type (8), sequences and documents + 1 (64 each); then
// lengths (32 bits) and places in bytes (64) of the sequences, and where the documents begin among these (64).
constexpr std::string_view kIndexMagic("MMIDIDX\0\0", 9);
constexpr int64_t kIndexHeader = 34;

std::optional<torch::Dtype> dtype_of_code(uint8_t code) {
  switch (code) {
    case 1:
      return at::kByte;
    case 3:
      return at::kShort;
    case 4:
      return at::kInt;
    case 5:
      return at::kLong;
    case 8:
      return at::kUInt16;
    default:
      return std::nullopt;
  }
}

/// [file size] uint8.
torch::Tensor map_file(const std::filesystem::path& file) {
  std::error_code error;
  const auto size = static_cast<int64_t>(std::filesystem::file_size(file, error));
  require(!error, "--data ", file.string(), ": ", error.message());
  require(size > 0, "--data ", file.string(), " is empty");
  return at::from_file(file.string(), /*shared=*/false, size, at::kByte);
}

/// What lies there, aligned or not.
template <typename Number>
Number number_at(const torch::Tensor& bytes, int64_t offset) {
  Number number;
  std::memcpy(&number, bytes.const_data_ptr<uint8_t>() + offset, sizeof number);
  return number;
}

std::filesystem::path index_of(std::filesystem::path file) {
  return file.replace_extension(".idx");
}

/// Calls `work` with a pointer to tokens of their type.
template <typename Work>
void with_type(torch::Dtype dtype, const uint8_t* tokens, const Work& work) {
  switch (dtype) {
    case at::kUInt16:
      return work(reinterpret_cast<const uint16_t*>(tokens));
    case at::kUInt32:
      return work(reinterpret_cast<const uint32_t*>(tokens));
    case at::kShort:
      return work(reinterpret_cast<const int16_t*>(tokens));
    case at::kInt:
      return work(reinterpret_cast<const int32_t*>(tokens));
    case at::kLong:
      return work(reinterpret_cast<const int64_t*>(tokens));
    default:
      return work(tokens);
  }
}

}  // namespace

bool TokenFile::is_one(const std::filesystem::path& file) {
  if (file.extension() == ".bin") {
    return true;
  }
  int32_t magic = 0;
  std::ifstream stream(file, std::ios::binary);
  stream.read(reinterpret_cast<char*>(&magic), sizeof magic);
  return stream && std::any_of(kLlmCFormats.begin(), kLlmCFormats.end(),
                               [&](const auto& format) { return format.magic == magic; });
}

TokenFile::TokenFile(const std::filesystem::path& file) : path_(file), bytes_(map_file(file)) {
  if (const auto index = index_of(file); std::filesystem::exists(index)) {
    read_megatron(index);
  } else {
    read_llm_c();
  }
}

void TokenFile::read_llm_c() {
  constexpr int64_t kHeader = kHeaderNumbers * 4;
  require(bytes_.size(0) >= kHeader, "--data ", path_.string(), " has ", bytes_.size(0),
          " bytes: neither llm.c's header, nor ", index_of(path_).string(), " beside it");
  const auto magic = number_at<int32_t>(bytes_, 0), version = number_at<int32_t>(bytes_, 4);
  const auto* format = std::find_if(kLlmCFormats.begin(), kLlmCFormats.end(),
                                    [&](const auto& known) { return known.magic == magic; });
  require(format != kLlmCFormats.end(), "--data ", path_.string(), " begins with ", magic,
          ", no magic number of llm.c's, and there is no ", index_of(path_).string());
  require(version == format->version, "--data ", path_.string(), " is of version ", version,
          "; version ", format->version, " is what can be read");
  dtype_ = format->dtype;
  size_ = number_at<int32_t>(bytes_, 8);
  const auto expected = kHeader + size_ * static_cast<int64_t>(c10::elementSize(dtype_));
  require(size_ >= 0 && expected == bytes_.size(0), "--data ", path_.string(), " has ",
          bytes_.size(0), " bytes; its header says ", size_, " tokens, which are ", expected);
  tokens_ = bytes_.const_data_ptr<uint8_t>() + kHeader;
  last_part_ = size_ - size_ / kHeldOutPart;
}

void TokenFile::read_megatron(const std::filesystem::path& index) {
  const torch::Tensor bytes = map_file(index);
  const auto wrong = [&](const auto&... what) {
    require(false, "--data ", index.string(), " ", what...);
  };
  const int64_t length = bytes.size(0);
  if (length < kIndexHeader ||
      std::memcmp(bytes.const_data_ptr<uint8_t>(), kIndexMagic.data(), kIndexMagic.size()) != 0) {
    wrong("is no index of Megatron's: it does not begin with MMIDIDX");
  }
  if (const auto version = number_at<uint64_t>(bytes, 9); version != 1) {
    wrong("is of version ", version, "; version 1 is what can be read");
  }
  const auto code = number_at<uint8_t>(bytes, 17);
  const auto dtype = dtype_of_code(code);
  if (!dtype) {
    wrong("says type ", static_cast<int>(code), ", which is none for tokens");
  }
  dtype_ = *dtype;
  const auto width = static_cast<int64_t>(c10::elementSize(dtype_));
  const auto sequences = number_at<int64_t>(bytes, 18), ends = number_at<int64_t>(bytes, 26);
  // In this order no product overflows.
  if (sequences < 0 || ends < 1 || sequences > length / 12 || ends > length / 8 ||
      kIndexHeader + sequences * 12 + ends * 8 != length) {
    wrong("has ", length, " bytes, which are not ", sequences, " sequences and ", ends - 1,
          " documents");
  }
  const int64_t places = kIndexHeader + sequences * 4, documents = places + sequences * 8;
  documents_ = ends - 1;
  size_ = bytes_.size(0) / width;
  last_part_ = size_ - size_ / kHeldOutPart;
  bool found = false;
  int64_t place = 0, next_document = 0;
  for (int64_t i = 0; i < sequences; ++i) {
    // Documents that begin here; empty ones begin where the next does.
    for (; next_document < ends && number_at<int64_t>(bytes, documents + next_document * 8) <= i;
         ++next_document) {
      if (!found && place >= last_part_) {
        last_part_ = place;
        found = true;
      }
    }
    const auto tokens = number_at<int32_t>(bytes, kIndexHeader + i * 4);
    if (tokens < 0 || number_at<int64_t>(bytes, places + i * 8) != place * width) {
      wrong("has sequence ", i, " of ", tokens, " tokens at byte ",
            number_at<int64_t>(bytes, places + i * 8), "; expected at byte ", place * width,
            ", behind the one before");
    }
    place += tokens;
  }
  if (place * width != bytes_.size(0)) {
    wrong("says ", place, " tokens, which are ", place * width, " bytes; ", path_.string(), " has ",
          bytes_.size(0));
  }
  tokens_ = bytes_.const_data_ptr<uint8_t>();
}

void TokenFile::copy(int64_t first, int64_t count, int64_t* out) const {
  with_type(dtype_, tokens_, [&](const auto* tokens) { std::copy_n(tokens + first, count, out); });
}

int64_t TokenFile::largest() const {
  int64_t result = -1;
  with_type(dtype_, tokens_, [&](const auto* tokens) {
    result = at::parallel_reduce(
        0, size_, int64_t{1} << 20, int64_t{-1},
        [&](int64_t begin, int64_t end, int64_t most) {
          return std::max<int64_t>(most, *std::max_element(tokens + begin, tokens + end));
        },
        [](int64_t one, int64_t other) { return std::max(one, other); });
  });
  return result;
}

}  // namespace train_lm
