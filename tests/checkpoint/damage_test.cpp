// Checkpoints that were damaged on the way: each is refused on every rank, and the model stays as
// it was.
#include <anabranch/checkpoint.h>
#include <gtest/gtest.h>

#include <fstream>
#include <iterator>

#include "checkpoint/checkpoint_case.h"
#include "checkpoint/index.h"
#include "support/file_bytes.h"
#include "support/random.h"
#include "support/shared_directory.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

namespace fs = std::filesystem;

/// A sound checkpoint, a model of other numbers, and a way to load the one, damaged, into the
/// other.
class DamagedCheckpoint : public ::testing::Test {
 protected:
  DamagedCheckpoint()
      : groups_(parallel_groups()),
        saved_(make_training({.num_experts = 3}, *groups_.expert_parallel, 1)),
        training_(make_training({.num_experts = 3}, *groups_.expert_parallel, 2)),
        random_(test_seed()) {
    train(saved_, 3, 1);
    train(training_, 4, 1);
    save_checkpoint(directory_.path(), *saved_.model, saved_.optimizer.get(), {{"key", "value"}},
                    groups_);
    snapshot_ = std::make_unique<Snapshot>(training_);
    for (const auto& name : files_in(directory_.path())) {
      sound_[name] = read_file(directory_.path() / name);
    }
  }

  std::string first_data_file() const {
    for (const auto& [name, bytes] : sound_) {
      if (name != kIndexName) return name;
    }
    throw std::logic_error("no data file");
  }

  /// The error's message, empty if there was none. The file is sound again afterwards.
  std::string load_with(const std::string& name, const std::string& bytes) {
    put(name, bytes);
    std::string message;
    try {
      load_checkpoint(directory_.path(), *training_.model, training_.optimizer.get(), groups_);
    } catch (const CheckpointError& error) {
      message = error.what();
    }
    put(name, sound_.at(name));
    return message;
  }

  void expect_refused(const std::string& name, const std::string& bytes, const std::string& text) {
    const auto message = load_with(name, bytes);
    EXPECT_FALSE(message.empty()) << name << " was loaded";
    EXPECT_NE(message.find(text), std::string::npos) << message << "\n  does not say " << text;
    snapshot_->expect_unchanged();
  }

  void put(const std::string& name, const std::string& bytes) {
    world()->barrier();
    if (world()->rank() == 0) write_file(directory_.path() / name, bytes);
    world()->barrier();
  }

  SharedDirectory directory_;
  ParallelGroups groups_;
  Training saved_;
  Training training_;
  std::unique_ptr<Snapshot> snapshot_;
  std::map<std::string, std::string> sound_;
  Random random_;
};

TEST_F(DamagedCheckpoint, SoundOneLoads) {
  EXPECT_EQ(load_with(kIndexName, sound_.at(kIndexName)), "");
  const Snapshot loaded(training_);
  train(saved_, 5, 1);
  train(training_, 5, 1);
  const auto expected = saved_.model->parameters();
  const auto actual = training_.model->parameters();
  for (size_t i = 0; i < expected.size(); ++i) EXPECT_TRUE(actual[i].equal(expected[i]));
}

TEST_F(DamagedCheckpoint, TruncatedAnywhere) {
  for (const auto& [name, bytes] : sound_) {
    const auto size = static_cast<int64_t>(bytes.size());
    std::vector<int64_t> lengths{0, 1, 7, 8, 9, size / 2, size - 2};
    if (name != kIndexName) lengths.push_back(size - 1);  // the index ends in a line break
    for (int64_t i = effort(20); i > 0; --i) lengths.push_back(random_.integer(0, size - 2));
    for (const auto length : lengths) {
      SCOPED_TRACE(c10::str(name, " cut to ", length, " of ", size));
      expect_refused(name, bytes.substr(0, static_cast<size_t>(length)), "");
    }
  }
}

TEST_F(DamagedCheckpoint, Lengthened) {
  for (const auto& [name, bytes] : sound_) expect_refused(name, bytes + "\1", "");
}

TEST_F(DamagedCheckpoint, AnyFlippedBitOfAFileIsFound) {
  for (const auto& [name, bytes] : sound_) {
    if (name == kIndexName) continue;
    const auto size = static_cast<int64_t>(bytes.size());
    std::vector<int64_t> places{0, 7, 8, size - 1};
    for (int64_t i = effort(40); i > 0; --i) places.push_back(random_.integer(0, size - 1));
    for (const auto place : places) {
      SCOPED_TRACE(c10::str(name, " changed at ", place));
      auto damaged = bytes;
      damaged[static_cast<size_t>(place)] ^= static_cast<char>(1 << random_.integer(0, 7));
      expect_refused(name, damaged, "");
    }
  }
}

// White space may change without a loss; nothing else.
TEST_F(DamagedCheckpoint, AnyFlippedBitOfTheIndexIsFound) {
  const auto& bytes = sound_.at(kIndexName);
  for (int64_t i = effort(150); i > 0; --i) {
    const auto place =
        static_cast<size_t>(random_.integer(0, static_cast<int64_t>(bytes.size()) - 1));
    if (bytes[place] == ' ' || bytes[place] == '\n') continue;
    SCOPED_TRACE(c10::str("changed at ", place));
    auto damaged = bytes;
    damaged[place] ^= static_cast<char>(1 << random_.integer(0, 7));
    expect_refused(kIndexName, damaged, kIndexName);
  }
}

TEST_F(DamagedCheckpoint, ForeignFiles) {
  std::string noise(1000, '\0');
  for (auto& byte : noise) byte = static_cast<char>(random_.integer(0, 255));
  const std::string png("\x89PNG\r\n\x1a\n\0\0\0\rIHDR", 16);
  for (const auto& [name, bytes] : sound_) {
    for (const auto& foreign :
         {std::string(), noise, png, std::string("{}"), std::string("[1, 2]"), std::string("null"),
          std::string(100000, '['), std::string(8, '\0'), std::string(5000, '\xff')}) {
      expect_refused(name, foreign, name == kIndexName ? "is not a whole index" : "safetensors");
    }
  }
}

/// A safetensors file with this header.
std::string with_header(const std::string& header, size_t data_bytes) {
  const uint64_t length = header.size();
  return std::string(reinterpret_cast<const char*>(&length), sizeof(length)) + header +
         std::string(data_bytes, '\0');
}

TEST_F(DamagedCheckpoint, HugeHeaderIsNotAllocated) {
  const auto name = first_data_file();
  for (const uint64_t length : {UINT64_MAX, UINT64_MAX - 7, uint64_t{1} << 63, uint64_t{1} << 40,
                                uint64_t{sound_.at(name).size()}}) {
    auto damaged = sound_.at(name);
    damaged.replace(0, 8, reinterpret_cast<const char*>(&length), 8);
    expect_refused(name, damaged, c10::str("a header of ", length, " bytes"));
  }
}

TEST_F(DamagedCheckpoint, HeadersThatLie) {
  const auto entry = [](const char* dtype, const char* shape, const char* offsets) {
    return c10::str(R"({"a":{"dtype":")", dtype, R"(","shape":)", shape, R"(,"data_offsets":)",
                    offsets, "}}");
  };
  const auto name = first_data_file();
  for (const auto& [header, text] : std::vector<std::pair<std::string, std::string>>{
           {entry("F32", "[2]", "[0,4]"), "are not the 8 bytes"},
           {entry("F32", "[2]", "[0,16]"), "are not the 8 bytes"},
           {entry("F32", "[2]", "[8,0]"), "are not the 8 bytes"},
           {entry("F32", "[2]", "[4,12]"), "one after another"},
           {entry("F32", "[1]", "[0,4]"), "tensors end at byte"},
           {entry("F32", "[4]", "[0,16]"), "beyond the file's end"},
           {entry("F32", "[-2]", "[0,8]"), "expected a whole number"},
           {entry("F32", "[2.0]", "[0,8]"), "expected a whole number"},
           {entry("F32", "[2]", "[-8,0]"), "expected a whole number"},
           {entry("F32", "[4294967296,4294967296]", "[0,8]"), "overflows"},
           {entry("F32", "[18446744073709551615]", "[0,8]"), "expected a whole number"},
           {entry("F32", "[0]", "[9223372036854775807,9223372036854775807]"), "overflow"},
           {entry("F32", "2", "[0,8]"), "must be an array"},
           {entry("F32", "[2]", "[0,8,9]"), "two numbers"},
           {entry("F31", "[2]", "[0,8]"), "unsupported dtype 'F31'"},
           {R"({"a":{"dtype":"F32","shape":[2]}})", "expected dtype, shape"},
           {R"({"a":1})", "expected dtype, shape"},
           {R"({"__metadata__":1})", "must be an object"},
           {R"({"__metadata__":{"a":1}})", "must hold strings"},
           {R"({"a":{"dtype":1,"shape":[2],"data_offsets":[0,8]}})", "tensor 'a'"},
       }) {
    SCOPED_TRACE(header);
    expect_refused(name, with_header(header, 8), text);
  }
  // Sound in itself, but not the checkpoint's.
  expect_refused(name, with_header(entry("F32", "[2]", "[0,8]"), 8), "the index says");
}

TEST_F(DamagedCheckpoint, MissingFile) {
  const auto name = first_data_file();
  world()->barrier();
  if (world()->rank() == 0) fs::remove(directory_.path() / name);
  world()->barrier();
  expect_checkpoint_error(
      [&] {
        load_checkpoint(directory_.path(), *training_.model, training_.optimizer.get(), groups_);
      },
      "No such file");
  snapshot_->expect_unchanged();
}

TEST_F(DamagedCheckpoint, IndexThatLeadsElsewhere) {
  auto index = parse_index(sound_.at(kIndexName));
  const auto stray = [&](const std::string& file) {
    auto changed = index;
    changed.files[file] = changed.files.begin()->second;
    return to_json(changed);
  };
  for (const char* file : {"../x.safetensors", "/etc/passwd", ".hidden", "", "a/b"}) {
    expect_refused(kIndexName, stray(file), "cannot be a checkpoint's file");
  }
  auto unlisted = index;
  unlisted.tensors["gate"].file = "other.safetensors";
  expect_refused(kIndexName, to_json(unlisted), "not listed");
  auto without = index;
  without.tensors.erase("gate");
  expect_refused(kIndexName, to_json(without), "has no 'gate'");
  auto extra = index;
  extra.tensors["ungated"] = extra.tensors["gate"];
  expect_refused(kIndexName, to_json(extra), "the model has not");
  auto longer = index;
  for (auto& [name, file] : longer.files) ++file.bytes;
  expect_refused(kIndexName, to_json(longer), "bytes, the index says");
}

}  // namespace
}  // namespace anabranch::test
