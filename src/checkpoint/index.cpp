#include "checkpoint/index.h"

#include <anabranch/error.h>
#include <c10/util/StringUtil.h>
#include <zlib.h>

#include <algorithm>
#include <cctype>
#include <limits>
#include <nlohmann/json.hpp>

#include "checkpoint/require.h"
#include "support/json.h"

namespace anabranch {
namespace {

using Json = nlohmann::json;

constexpr const char* kFormat = "anabranch checkpoint";
constexpr int64_t kVersion = 1;

/// CRC-32 of the index without its own checksum, in the one form that Json::dump gives it.
uint32_t index_checksum(Json json) {
  json.erase("index_crc32");
  const std::string text = json.dump();
  return static_cast<uint32_t>(
      crc32_z(0, reinterpret_cast<const Bytef*>(text.data()), text.size()));
}

/// A name in the checkpoint's own directory: an index must not lead anywhere else.
void check_file_name(const std::string& name) {
  const bool printable =
      std::none_of(name.begin(), name.end(), [](unsigned char byte) { return std::iscntrl(byte); });
  require(!name.empty() && printable && name.find('/') == std::string::npos && name.front() != '.',
          Json(name).dump(), " cannot be a checkpoint's file");
}

uint32_t checksum_from(const Json& json) {
  return static_cast<uint32_t>(json_size(json, std::numeric_limits<uint32_t>::max()));
}

CheckpointIndex from_json(const Json& json) {
  CheckpointIndex index;
  index.metadata = json.at("metadata").get<CheckpointMetadata>();
  index.optimizer = json.at("optimizer").get<std::string>();
  for (const auto& [name, file] : json.at("files").items()) {
    check_file_name(name);
    index.files.emplace(name, CheckpointIndex::StoredFile{json_size(file.at("bytes")),
                                                          checksum_from(file.at("header_crc32"))});
  }
  const auto& checksums = json.at("crc32");
  for (const auto& [name, file] : json.at("weight_map").items()) {
    require(index.files.contains(file.get<std::string>()), "tensor '", name,
            "' lies in a file that is not listed");
    index.tensors.emplace(name,
                          CheckpointIndex::StoredTensor{file, checksum_from(checksums.at(name))});
  }
  require(checksums.size() == index.tensors.size(), "there are checksums of unknown tensors");
  return index;
}

}  // namespace

std::string to_json(const CheckpointIndex& index) {
  Json files = Json::object();
  for (const auto& [name, file] : index.files) {
    files[name] = {{"bytes", file.bytes}, {"header_crc32", file.header_checksum}};
  }
  Json weight_map = Json::object();
  Json checksums = Json::object();
  for (const auto& [name, stored] : index.tensors) {
    weight_map[name] = stored.file;
    checksums[name] = stored.checksum;
  }
  Json json{{"format", kFormat},
            {"version", kVersion},
            {"metadata", index.metadata},
            {"optimizer", index.optimizer},
            {"files", std::move(files)},
            {"weight_map", std::move(weight_map)},
            {"crc32", std::move(checksums)}};
  json["index_crc32"] = index_checksum(json);
  return json.dump(/*indent=*/2) + "\n";
}

CheckpointIndex parse_index(const std::string& text) {
  try {
    const Json json = parse_json(text);
    require(json.is_object() && json.value("format", Json()) == kFormat, "its format is not '",
            kFormat, "'");
    require(json.at("version") == kVersion, "its version is ", json.at("version").dump(),
            ", expected ", kVersion);
    require(json.at("index_crc32") == index_checksum(json), "its checksum does not match");
    return from_json(json);
  } catch (const std::exception& error) {
    throw CheckpointError(c10::str(kIndexName, " is not a whole index: ", error.what()));
  }
}

}  // namespace anabranch
