#include <ATen/ATen.h>
#include <anabranch/error.h>
#include <anabranch/safetensors.h>
#include <zlib.h>

#include <algorithm>
#include <array>
#include <bit>
#include <nlohmann/json.hpp>
#include <utility>

#include "checkpoint/file.h"
#include "checkpoint/require.h"
#include "support/json.h"

namespace anabranch {
namespace {

using Json = nlohmann::json;
using Entry = SafetensorsReader::Entry;

static_assert(std::endian::native == std::endian::little, "the format is little-endian");

constexpr int64_t kPrefixBytes = 8;
// The reference implementation's limit.
constexpr uint64_t kMaxHeaderBytes = 100'000'000;
constexpr const char* kMetadataKey = "__metadata__";

constexpr std::array<std::pair<at::ScalarType, const char*>, 12> kDtypes{{
    {at::kDouble, "F64"},
    {at::kFloat, "F32"},
    {at::kHalf, "F16"},
    {at::kBFloat16, "BF16"},
    {at::kFloat8_e4m3fn, "F8_E4M3"},
    {at::kFloat8_e5m2, "F8_E5M2"},
    {at::kLong, "I64"},
    {at::kInt, "I32"},
    {at::kShort, "I16"},
    {at::kChar, "I8"},
    {at::kByte, "U8"},
    {at::kBool, "BOOL"},
}};

at::ScalarType parse_dtype(const std::string& text) {
  for (const auto& [dtype, name] : kDtypes) {
    if (text == name) return dtype;
  }
  throw CheckpointError("unsupported dtype '" + text + "'");
}

Entry parse_entry(const Json& json, int64_t buffer_start) {
  require(json.is_object() && json.size() == 3, "expected dtype, shape and data_offsets");
  Entry entry{parse_dtype(json.at("dtype").get<std::string>()), {}, 0, 0};
  auto bytes = static_cast<int64_t>(c10::elementSize(entry.dtype));
  int64_t strides = bytes;  // as those of a tensor without elements, too
  require(json.at("shape").is_array(), "shape must be an array");
  for (const auto& value : json.at("shape")) {
    const int64_t size = json_size(value);
    entry.shape.push_back(size);
    require(!__builtin_mul_overflow(strides, std::max<int64_t>(size, 1), &strides),
            "shape overflows");
    bytes *= size;
  }
  const auto& offsets = json.at("data_offsets");
  require(offsets.is_array() && offsets.size() == 2, "data_offsets must be two numbers");
  const int64_t begin = json_size(offsets[0]);
  const int64_t end = json_size(offsets[1]);
  require(begin <= end && end - begin == bytes, "data_offsets [", begin, ", ", end,
          "] are not the ", bytes, " bytes of its shape and dtype");
  require(!__builtin_add_overflow(begin, buffer_start, &entry.offset), "data_offsets overflow");
  entry.bytes = bytes;
  return entry;
}

void check_metadata(const Json& metadata) {
  require(metadata.is_object(), kMetadataKey, " must be an object");
  for (const auto& value : metadata) require(value.is_string(), kMetadataKey, " must hold strings");
}

/// The tensors must fill the file from the header's end to the file's end: no gap, no overlap.
void check_layout(const std::map<std::string, Entry>& entries, int64_t start, int64_t end) {
  std::vector<std::pair<int64_t, int64_t>> ranges;
  for (const auto& [name, entry] : entries) ranges.emplace_back(entry.offset, entry.bytes);
  std::sort(ranges.begin(), ranges.end());
  for (const auto& [offset, bytes] : ranges) {
    require(offset == start, "tensors do not lie one after another at byte ", start);
    require(bytes <= end - start, "tensors reach beyond the file's end at byte ", end);
    start += bytes;
  }
  require(start == end, "tensors end at byte ", start, ", the file at byte ", end);
}

uint32_t checksum_of(const void* data, size_t bytes) {
  return static_cast<uint32_t>(crc32_z(0, static_cast<const Bytef*>(data), bytes));
}

/// The JSON text, as long as the file says if that can be.
std::string read_header(const File& file, int64_t file_bytes) {
  require(file_bytes >= kPrefixBytes, file_bytes, " bytes are too few");
  uint64_t header_bytes = 0;
  file.read(&header_bytes, kPrefixBytes, 0);
  require(header_bytes <= std::min<uint64_t>(kMaxHeaderBytes, file_bytes - kPrefixBytes),
          "a header of ", header_bytes, " bytes in a file of ", file_bytes);
  std::string text(header_bytes, '\0');
  file.read(text.data(), static_cast<int64_t>(header_bytes), kPrefixBytes);
  return text;
}

std::map<std::string, Entry> parse_header(const std::string& text, int64_t file_bytes) {
  const Json header = parse_json(text);
  require(header.is_object(), "the header is not a JSON object");
  const int64_t start = kPrefixBytes + static_cast<int64_t>(text.size());
  std::map<std::string, Entry> entries;
  for (const auto& [name, value] : header.items()) {
    if (name == kMetadataKey) {
      check_metadata(value);
      continue;
    }
    try {
      entries.emplace(name, parse_entry(value, start));
    } catch (const std::exception& error) {
      throw CheckpointError("tensor '" + name + "': " + error.what());
    }
  }
  check_layout(entries, start, file_bytes);
  return entries;
}

/// The header as it stands in the file, with spaces behind it so that the tensors are aligned.
std::string make_header(const std::vector<NamedTensor>& tensors) {
  Json header;
  // Readers take it as "made by a torch".
  header[kMetadataKey] = {{"format", "pt"}};
  int64_t offset = 0;
  for (const auto& [name, tensor] : tensors) {
    require(!header.contains(name), "two tensors are named '", name, "'");
    const auto bytes = static_cast<int64_t>(tensor.nbytes());
    header[name] = {{"dtype", safetensors_dtype(tensor.scalar_type())},
                    {"shape", tensor.sizes().vec()},
                    {"data_offsets", {offset, offset + bytes}}};
    offset += bytes;
  }
  std::string text = header.dump();
  text.resize((text.size() + kPrefixBytes - 1) / kPrefixBytes * kPrefixBytes, ' ');
  require(text.size() <= kMaxHeaderBytes, "a header of ", text.size(), " bytes is too long");
  return text;
}

}  // namespace

std::string safetensors_dtype(torch::Dtype dtype) {
  for (const auto& [known, name] : kDtypes) {
    if (dtype == known) return name;
  }
  throw CheckpointError(c10::str("safetensors cannot hold tensors of type ", dtype));
}

uint32_t checksum(const torch::Tensor& tensor) {
  return checksum_of(tensor.const_data_ptr(), tensor.nbytes());
}

WrittenFile write_safetensors(const std::filesystem::path& path, std::vector<NamedTensor> tensors) {
  // Wide types first: each tensor is then aligned to its type.
  std::stable_sort(tensors.begin(), tensors.end(), [](const auto& a, const auto& b) {
    return a.tensor.element_size() > b.tensor.element_size();
  });
  const std::string header = make_header(tensors);
  const uint64_t header_bytes = header.size();
  File file = File::create(path);
  file.write(&header_bytes, kPrefixBytes);
  file.write(header.data(), static_cast<int64_t>(header_bytes));
  WrittenFile written{0, checksum_of(header.data(), header.size()), {}};
  for (const auto& [name, tensor] : tensors) {
    const auto data = tensor.detach().to(at::kCPU).contiguous();
    file.write(data.const_data_ptr(), static_cast<int64_t>(data.nbytes()));
    written.checksums.emplace(name, checksum(data));
  }
  file.sync();
  written.bytes = file.size();
  return written;
}

SafetensorsReader::SafetensorsReader(const std::filesystem::path& path)
    : path_(path.string()),
      file_(std::make_unique<File>(File::open(path))),
      file_bytes_(file_->size()) {
  try {
    const auto header = read_header(*file_, file_bytes_);
    header_checksum_ = checksum_of(header.data(), header.size());
    entries_ = parse_header(header, file_bytes_);
  } catch (const std::exception& error) {
    throw CheckpointError(path_ + " is not a whole safetensors file: " + error.what());
  }
}

SafetensorsReader::~SafetensorsReader() = default;
SafetensorsReader::SafetensorsReader(SafetensorsReader&& other) noexcept = default;

torch::Tensor SafetensorsReader::read(const std::string& name) const {
  const auto found = entries_.find(name);
  require(found != entries_.end(), path_, " holds no tensor '", name, "'");
  const auto& entry = found->second;
  auto tensor = at::empty(entry.shape, at::TensorOptions(entry.dtype));
  file_->read(tensor.mutable_data_ptr(), entry.bytes, entry.offset);
  return tensor;
}

}  // namespace anabranch
