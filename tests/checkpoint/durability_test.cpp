// What a save asks of the file system so that a crash of the machine loses nothing, and what it says where
// that fails. Every fsync of this program comes by here first.
#include <anabranch/checkpoint.h>
#include <gtest/gtest.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <fstream>
#include <functional>
#include <set>

#include "checkpoint/checkpoint_case.h"
#include "checkpoint/index.h"
#include "support/shared_directory.h"

namespace {

std::set<std::filesystem::path> synced;
/// Whether the sync of a path fails.
std::function<bool(const std::filesystem::path&)> fails;

}  // namespace

extern "C" int fsync(int descriptor) {
  const auto path = std::filesystem::read_symlink("/proc/self/fd/" + std::to_string(descriptor));
  if (fails && fails(path)) {
    errno = EIO;
    return -1;
  }
  synced.insert(path);
  return static_cast<int>(syscall(SYS_fsync, descriptor));
}

namespace anabranch::test {
namespace {

namespace fs = std::filesystem;

std::string text_of(const fs::path& path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), {}};
}

class Durability : public ::testing::Test {
 protected:
  Durability() : training_(make_training({}, *groups_.expert_parallel, 1)) {
    train(training_, 3, 1);
    synced.clear();
  }
  ~Durability() override { fails = nullptr; }

  void save(const fs::path& directory) {
    save_checkpoint(directory, *training_.model, training_.optimizer.get(), {}, groups_);
  }

  /// A model of other numbers that was loaded is then that of `expected`.
  void expect_loads(const fs::path& directory, const Training& expected) {
    auto other = make_training({}, *groups_.expert_parallel, 9);
    load_checkpoint(directory, *other.model, other.optimizer.get(), groups_);
    expect_part_of(other, expected);
  }

  const SharedDirectory directory_;
  const ParallelGroups groups_ = make_parallel_groups(make_self_communicator());
  Training training_;
};

TEST_F(Durability, ANewDirectoryIsSyncedInItsParentHoweverItIsWritten) {
  const auto base = fs::canonical(directory_.path());
  for (const std::string path : {"a", "b/", "c/d", "e/f/", "g/h//i/.", "j/../k/"}) {
    synced.clear();
    save(base / path);
    auto parent = base;
    for (const auto& part : fs::path(path).lexically_normal()) {
      EXPECT_TRUE(synced.contains(parent)) << parent << " of " << path;
      if (!part.empty()) parent /= part;
    }
    expect_loads(base / path, training_);
  }
}

TEST_F(Durability, ARelativeDirectory) {
  const auto before = fs::current_path();
  fs::current_path(directory_.path());
  save("x/y");
  const auto base = fs::current_path();
  fs::current_path(before);
  EXPECT_TRUE(synced.contains(base) && synced.contains(base / "x") &&
              synced.contains(base / "x/y"));
}

TEST_F(Durability, AFailureAfterTheChangeSaysThatTheNewOneStands) {
  const auto directory = fs::canonical(directory_.path());
  save(directory);
  const auto former = files_in(directory);
  const auto index = text_of(directory / kIndexName);
  train(training_, 5, 2);
  fails = [&](const fs::path& path) {
    return path == directory && text_of(directory / kIndexName) != index;
  };
  expect_checkpoint_error([&] { save(directory); }, "has taken the former one's place");
  expect_loads(directory, training_);
  const auto files = files_in(directory);
  for (const auto& name : former) EXPECT_TRUE(files.contains(name)) << name;

  // The next save clears up.
  fails = nullptr;
  save(directory);
  EXPECT_EQ(files_in(directory).size(), former.size());
}

TEST_F(Durability, AFailureBeforeTheChangeLeavesTheFormerOneAlone) {
  const auto directory = fs::canonical(directory_.path());
  save(directory);
  const auto former = files_in(directory);
  auto later = make_training({}, *groups_.expert_parallel, 1);
  train(later, 5, 4);
  for (const std::string what : {".safetensors", kIndexName, ""}) {
    fails = [&](const fs::path& path) {
      const auto text = path.string();
      return what.empty() ? path == directory : text.find(what) != std::string::npos;
    };
    expect_checkpoint_error(
        [&] { save_checkpoint(directory, *later.model, later.optimizer.get(), {}, groups_); },
        "fsync");
    EXPECT_EQ(files_in(directory), former) << what;
    expect_loads(directory, training_);
  }
}

}  // namespace
}  // namespace anabranch::test
