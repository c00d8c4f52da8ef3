#pragma once

#include <anabranch/checkpoint.h>

#include <cstdint>
#include <map>
#include <string>

namespace anabranch {

/// What `checkpoint.index.json` says: which files belong to the checkpoint and what is in them.
struct CheckpointIndex {
  struct StoredFile {
    int64_t bytes = 0;
    uint32_t header_checksum = 0;
  };
  struct StoredTensor {
    std::string file;
    uint32_t checksum = 0;  ///< CRC-32 of its bytes
  };

  CheckpointMetadata metadata;
  std::string optimizer;                        ///< its class; empty: no optimizer was saved
  std::map<std::string, StoredFile> files;      ///< by name
  std::map<std::string, StoredTensor> tensors;  ///< by name
};

inline constexpr const char* kIndexName = "checkpoint.index.json";

/// JSON with a CRC-32 of itself.
std::string to_json(const CheckpointIndex& index);

/// Throws CheckpointError for anything but what `to_json` wrote.
CheckpointIndex parse_index(const std::string& text);

}  // namespace anabranch
