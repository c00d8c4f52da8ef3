// Files that someone made in order to break the reader. Each ends in a CheckpointError or is sound after
// all: no crash, no other exception, no wait, no memory beyond the file's own size.
#include <anabranch/checkpoint.h>
#include <anabranch/safetensors.h>
#include <c10/util/StringUtil.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "checkpoint/checkpoint_case.h"
#include "checkpoint/index.h"
#include "fuzz/crc32.h"
#include "fuzz/targets.h"
#include "support/file_bytes.h"
#include "support/mutations.h"
#include "support/random.h"
#include "support/shared_directory.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

/// A safetensors file with this header and so many bytes behind it.
std::string safetensors_with(const std::string& header, size_t bytes = 0) {
  std::string text(8, '\0');
  const uint64_t length = header.size();
  std::memcpy(text.data(), &length, sizeof(length));
  return text + header + std::string(bytes, 'x');
}

std::string repeat(const std::string& word, int64_t times) {
  std::string text;
  for (int64_t i = 0; i < times; ++i) text += word;
  return text;
}

class HostileFile : public ::testing::Test {
 protected:
  HostileFile() : path_(directory_.path() / "hostile") {}

  SafetensorsReader reader_of(const std::string& bytes) {
    write_file(path_, bytes);
    return SafetensorsReader(path_);
  }

  const SharedDirectory directory_;
  const fs::path path_;
};

TEST_F(HostileFile, AMillionBrackets) {
  constexpr int64_t kDepth = 1'000'000;
  for (const auto& [open, close] :
       std::map<std::string, std::string>{{"[", "]"}, {"{\"a\":", "}"}}) {
    const std::string deep = repeat(open, kDepth) + "1" + repeat(close, kDepth);
    const std::string shape =
        "{\"t\":{\"dtype\":\"F32\",\"shape\":[" + deep + "],\"data_offsets\":[0,0]}}";
    expect_checkpoint_error([&] { reader_of(safetensors_with(deep)); }, "deeper");
    expect_checkpoint_error([&] { reader_of(safetensors_with(shape)); }, "deeper");
    expect_checkpoint_error([&] { parse_index("{\"version\":" + deep + "}"); }, "deeper");
    expect_checkpoint_error(
        [&] { parse_index("{\"format\":\"anabranch checkpoint\",\"version\":" + deep + "}"); },
        "deeper");
  }
}

TEST_F(HostileFile, WhatStandsBehindAZeroIsReadToo) {
  const std::string behind("{}\0{\"format\":1}", 16);
  expect_checkpoint_error([&] { reader_of(safetensors_with(behind)); }, "no JSON at byte 3");
  expect_checkpoint_error([&] { parse_index(behind); }, "no JSON at byte 3");
}

TEST_F(HostileFile, SizesWhoseProductOverflowsAreRefusedWhereOneOfThemIsZero) {
  for (const std::string shape : {"[0,4611686018427387904,4611686018427387904]",
                                  "[4611686018427387904,4611686018427387904,0]"}) {
    expect_checkpoint_error(
        [&] {
          reader_of(safetensors_with("{\"t\":{\"dtype\":\"F32\",\"shape\":" + shape +
                                     ",\"data_offsets\":[0,0]}}"));
        },
        "overflows");
  }
}

TEST_F(HostileFile, APipeIsNoFileAndNobodyWaitsForItsWriter) {
  ASSERT_EQ(mkfifo(path_.c_str(), 0600), 0);
  expect_checkpoint_error([&] { SafetensorsReader reader(path_); }, "not a regular file");
}

class HostileIndex : public ::testing::Test {
 protected:
  HostileIndex()
      : saved_(make_training({}, *groups_.expert_parallel, 1)),
        training_(make_training({}, *groups_.expert_parallel, 2)) {
    train(saved_, 3, 1);
    save_checkpoint(directory_.path(), *saved_.model, saved_.optimizer.get(), {{"step", "1"}},
                    groups_);
    sound_ = read_file(directory_.path() / kIndexName);
  }

  void load(const std::string& index) {
    write_file(directory_.path() / kIndexName, index);
    load_checkpoint(directory_.path(), *training_.model, training_.optimizer.get(), groups_);
  }

  const SharedDirectory directory_;
  const ParallelGroups groups_ = make_parallel_groups(make_self_communicator());
  Training saved_;
  Training training_;
  std::string sound_;
};

TEST_F(HostileIndex, OtherNumbersThanSizes) {
  const Snapshot before(training_);
  for (const std::string number : {"-1", "1.5", "1e300", "18446744073709551615", "null", "true"}) {
    for (const std::string field : {"bytes", "header_crc32"}) {
      auto json = Json::parse(sound_);
      json["files"].front()[field] = Json::parse(number);
      expect_checkpoint_error([&] { load(with_checksum(json.dump())); }, "expected a whole number");
    }
    auto json = Json::parse(sound_);
    json["crc32"].front() = Json::parse(number);
    expect_checkpoint_error([&] { load(with_checksum(json.dump())); }, "expected a whole number");
  }
  before.expect_unchanged();
}

TEST_F(HostileIndex, NamesThatLeadElsewhere) {
  for (const std::string name : {"../x", "/etc/passwd", ".hidden", "", "a\nb", "a\tb"}) {
    auto json = Json::parse(sound_);
    json["files"][name] = json["files"].front();
    expect_checkpoint_error([&] { load(with_checksum(json.dump())); },
                            "cannot be a checkpoint's file");
  }
  auto json = Json::parse(sound_);
  json["files"][std::string("a\0b", 3)] = json["files"].front();
  expect_checkpoint_error([&] { load(with_checksum(json.dump())); },
                          "cannot be a checkpoint's file");
}

TEST_F(HostileIndex, ATerabyteOfNothing) {
  const auto index = directory_.path() / kIndexName;
  ASSERT_EQ(truncate(index.c_str(), int64_t{1} << 40), 0);
  expect_checkpoint_error(
      [&] {
        load_checkpoint(directory_.path(), *training_.model, training_.optimizer.get(), groups_);
      },
      "too large for an index");
}

TEST_F(HostileIndex, APipe) {
  for (const auto& file : files_in(directory_.path())) {
    const auto bytes = read_file(directory_.path() / file);
    fs::remove(directory_.path() / file);
    ASSERT_EQ(mkfifo((directory_.path() / file).c_str(), 0600), 0);
    expect_checkpoint_error(
        [&] {
          load_checkpoint(directory_.path(), *training_.model, training_.optimizer.get(), groups_);
        },
        "not a regular file");
    fs::remove(directory_.path() / file);
    write_file(directory_.path() / file, bytes);
  }
}

TEST_F(HostileIndex, FuzzedAndLoaded) {
  Random random(test_seed());
  const auto words = fuzz_target("index").words;
  load(with_checksum(
      sound_));  // so not all is refused, however few inputs a loaded machine comes to
  auto snapshot = std::make_unique<Snapshot>(training_);
  int64_t loaded = 0;
  const int64_t count =
      fuzz("loaded_index", Mutator(random.next(), {sound_}, words), [&](const std::string& text) {
        try {
          load(with_checksum(text));
          ++loaded;
          expect_part_of(training_, saved_);
          snapshot = std::make_unique<Snapshot>(training_);
        } catch (const CheckpointError&) {
          snapshot->expect_unchanged();
        }
        ASSERT_FALSE(HasFailure());
      });
  RecordProperty("inputs", std::to_string(count));
  EXPECT_LT(loaded, count);
}

}  // namespace
}  // namespace anabranch::test
