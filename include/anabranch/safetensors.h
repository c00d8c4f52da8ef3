#pragma once

#include <torch/types.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace anabranch {

class File;

// The safetensors format (https://huggingface.co/docs/safetensors): the header's length as 8 bytes,
// little-endian; the header in JSON; then the tensors' bytes without a gap.

/// A tensor and the name that it has in a file.
struct NamedTensor {
  std::string name;
  torch::Tensor tensor;
};

/// Sizes and CRC-32s of a file that was written.
struct WrittenFile {
  int64_t bytes;                              ///< of the whole file
  uint32_t header_checksum;                   ///< of everything before the tensors
  std::map<std::string, uint32_t> checksums;  ///< of each tensor's bytes
};

/// Writes `tensors` (any device) to a new file and syncs it.
WrittenFile write_safetensors(const std::filesystem::path& path, std::vector<NamedTensor> tensors);

/// A safetensors file whose header was found to be whole and to agree with the file's size;
/// anything else is a CheckpointError.
class SafetensorsReader {
 public:
  /// A tensor in the file.
  struct Entry {
    torch::Dtype dtype;
    std::vector<int64_t> shape;
    int64_t offset;  ///< in the file
    int64_t bytes;
  };

  explicit SafetensorsReader(const std::filesystem::path& path);
  ~SafetensorsReader();
  SafetensorsReader(SafetensorsReader&& other) noexcept;

  const std::map<std::string, Entry>& entries() const { return entries_; }
  int64_t file_bytes() const { return file_bytes_; }
  uint32_t header_checksum() const { return header_checksum_; }
  /// The tensor, on the CPU.
  torch::Tensor read(const std::string& name) const;

 private:
  std::string path_;
  std::unique_ptr<File> file_;
  int64_t file_bytes_;
  uint32_t header_checksum_ = 0;
  std::map<std::string, Entry> entries_;
};

/// CRC-32 of the bytes of a contiguous tensor on the CPU.
uint32_t checksum(const torch::Tensor& tensor);

/// "F32", "BF16", ...; throws CheckpointError for a type that the format does not have.
std::string safetensors_dtype(torch::Dtype dtype);

}  // namespace anabranch
