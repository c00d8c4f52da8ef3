#include "fuzz/targets.h"

#include <ATen/ATen.h>
#include <anabranch/error.h>
#include <anabranch/safetensors.h>
#include <c10/util/StringUtil.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <stdexcept>

#include "../../python_bindings/operators/options.h"
#include "checkpoint/index.h"
#include "communicator/nccl/datagram.h"
#include "fuzz/crc32.h"
#include "support/file_bytes.h"

namespace anabranch::test {
namespace {

namespace fs = std::filesystem;

const std::vector<std::string> kJsonWords{"{",
                                          "}",
                                          "[",
                                          "]",
                                          ":",
                                          ",",
                                          "\"",
                                          "\\u0000",
                                          "null",
                                          "true",
                                          "-1",
                                          "0",
                                          "1.5",
                                          "1e300",
                                          "9223372036854775807",
                                          "9223372036854775808",
                                          "18446744073709551616",
                                          "\"\":",
                                          "[[",
                                          "{\"a\":"};

std::vector<std::string> json_and(const std::vector<std::string>& more) {
  auto words = kJsonWords;
  words.insert(words.end(), more.begin(), more.end());
  return words;
}

void expect(bool condition, const char* what) {
  if (!condition) throw std::logic_error(what);
}

/// The bytes are signed with the right key, as by a rank whose memory is damaged.
FuzzTarget datagrams() {
  constexpr int kRanks = 9;
  constexpr SipHashKey kKey = {1, 2};
  const auto unsigned_part = [=](const HeartbeatDatagram& datagram) {
    const std::string bytes = encode(datagram, kKey);
    return bytes.substr(0, bytes.size() - sizeof(uint64_t));
  };
  const auto is_rank = [](int rank) { return rank >= 0 && rank < kRanks; };
  const auto take = [=](std::string bytes) {
    const uint64_t signature = siphash(kKey, bytes.data(), bytes.size());
    bytes.append(reinterpret_cast<const char*>(&signature), sizeof(signature));
    const auto decoded = decode(bytes, kKey, kRanks);
    if (!decoded.has_value()) return false;
    expect(is_rank(decoded->rank) && decoded->ended >= 0 && decoded->ended <= decoded->started,
           "a field is out of bounds");
    expect(encode(*decoded, kKey) == bytes, "it says something else than its bytes");
    if (decoded->failure.has_value()) {
      const auto& [text, culprits] = *decoded->failure;
      expect(culprits.size() <= HeartbeatDatagram::kMostCulprits &&
                 text.size() <= HeartbeatDatagram::kMostText,
             "there is more than there is room for");
      expect(std::all_of(culprits.begin(), culprits.end(), is_rank), "a culprit is no rank");
    }
    return true;
  };
  return {"datagram",
          {unsigned_part({8, 7, 3, 2}), unsigned_part({0, 1, 0, 0, NcclFailure{"no more", {1, 2}}}),
           unsigned_part({3, ~uint64_t{0}, int64_t{1} << 40, int64_t{1} << 39,
                          NcclFailure{std::string(300, 'x'), std::vector<int>(64, 8)}})},
          {std::string(1, '\0'), "\x7f", "\x80", "\xff", std::string("\xff\xff\xff\xff", 4),
           std::string("\x40\0", 2), std::string("\0\x03", 2)},
          take};
}

/// A folder of this process, removed at its end.
class Folder {
 public:
  Folder() {
    std::string name = (fs::temp_directory_path() / "anabranch-fuzz-XXXXXX").string();
    if (mkdtemp(name.data()) == nullptr) throw std::runtime_error("mkdtemp failed");
    path_ = name;
  }
  ~Folder() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
  }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;
  fs::path file() const { return path_ / "input"; }

 private:
  fs::path path_;
};

/// Every tensor is its bytes, as they lie in the file.
bool read_safetensors(const fs::path& path, const std::string& bytes) {
  try {
    const SafetensorsReader reader(path);
    int64_t total = 0;
    for (const auto& [name, entry] : reader.entries()) {
      const auto tensor = reader.read(name);
      const auto* data = static_cast<const char*>(tensor.const_data_ptr());
      expect(static_cast<int64_t>(tensor.nbytes()) == entry.bytes &&
                 tensor.sizes() == at::IntArrayRef(entry.shape),
             "a tensor is of another size than its entry");
      expect(entry.offset + entry.bytes <= std::ssize(bytes), "a tensor ends behind the file");
      expect(std::equal(data, data + entry.bytes, bytes.data() + entry.offset),
             "a tensor is of other bytes than the file's");
      total += entry.bytes;
    }
    expect(total <= std::ssize(bytes) - 8, "the tensors are larger than the file");
    return true;
  } catch (const CheckpointError&) {
    return false;
  }
}

FuzzTarget safetensors() {
  const auto folder = std::make_shared<Folder>();
  std::vector<std::string> samples;
  for (int64_t count = 0; count < 4; ++count) {
    std::vector<NamedTensor> tensors;
    for (int64_t i = 0; i < count; ++i) {
      const auto type = i % 2 == 0 ? at::kBFloat16 : at::kLong;
      tensors.push_back({c10::str("t", i), at::arange(i * (i + 1)).view({i, i + 1}).to(type)});
    }
    fs::remove(folder->file());
    write_safetensors(folder->file(), tensors);
    samples.push_back(read_file(folder->file()));
  }
  return {"safetensors", samples,
          json_and({"\"dtype\"", "\"F32\"", "\"BF16\"", "\"BOOL\"", "\"shape\"", "\"data_offsets\"",
                    "\"__metadata__\"", "[0,0]", "[]"}),
          [folder](const std::string& bytes) {
            write_file(folder->file(), bytes);
            return read_safetensors(folder->file(), bytes);
          }};
}

FuzzTarget indexes() {
  CheckpointIndex index;
  index.metadata = {{"step", "1"}};
  index.optimizer = "adamw";
  index.files = {{"rank-0.safetensors", {120, 7}}};
  index.tensors = {{"a.weight", {"rank-0.safetensors", 1}}, {"b", {"rank-0.safetensors", 2}}};
  return {"index",
          {to_json(index)},
          json_and({"\"format\"", "\"version\"", "\"metadata\"", "\"optimizer\"", "\"files\"",
                    "\"weight_map\"", "\"crc32\"", "\"bytes\""}),
          [](const std::string& text) {
            try {
              const auto parsed = parse_index(with_checksum(text));
              for (const auto& [name, tensor] : parsed.tensors) {
                expect(parsed.files.contains(tensor.file),
                       "a tensor's file is none of the index's");
              }
              expect(to_json(parse_index(to_json(parsed))) == to_json(parsed),
                     "an index that was read is written otherwise");
              return true;
            } catch (const CheckpointError&) {
              return false;
            }
          }};
}

FuzzTarget options() {
  return {"options",
          {R"({"hidden_size": 8, "expert_hidden_size": 12, "num_experts": 4, "top_k": 2})",
           R"({"hidden_size": 8, "expert_hidden_size": 12, "num_experts": 4, "activation": "silu",
               "glu": true, "jitter": 0.01, "engine": "auto", "seed": 7})"},
          json_and({"\"hidden_size\"", "\"num_experts\"", "\"gate\"", "\"sigmoid\"", "\"errors\"",
                    "\"routing_scale\"", "\"top_groups\""}),
          [](const std::string& text) {
            try {
              operators::options_from_json(text);
              return true;
            } catch (const InputError&) {
              return false;
            }
          }};
}

}  // namespace

std::vector<FuzzTarget> fuzz_targets() {
  return {datagrams(), safetensors(), indexes(), options()};
}

FuzzTarget fuzz_target(const std::string& name) {
  for (const auto& target : fuzz_targets()) {
    if (target.name == name) return target;
  }
  throw std::out_of_range("there is no parser '" + name + "' to be fuzzed");
}

}  // namespace anabranch::test
